"""MDPs in the forms that others keep them in, and back; what each form calls an end is masked."""

from birl_ext.convert.gymnasium import (
    EnumeratedMDP,
    enumerate_env,
    from_gymnasium,
    key_of,
    to_gymnasium,
)
from birl_ext.convert.logs import LoggedMDP, from_logs
from birl_ext.convert.mdptoolbox import ToolboxTables, from_mdptoolbox, to_mdptoolbox
from birl_ext.convert.prism import PrismModel, read_prism, write_prism
from birl_ext.convert.quantecon import from_quantecon, to_quantecon
from birl_ext.convert.stack import StackedMDP, stack
from birl_ext.convert.table import mask_ends

__all__ = [
    "EnumeratedMDP",
    "LoggedMDP",
    "PrismModel",
    "StackedMDP",
    "ToolboxTables",
    "enumerate_env",
    "from_gymnasium",
    "from_logs",
    "from_mdptoolbox",
    "from_quantecon",
    "key_of",
    "mask_ends",
    "read_prism",
    "stack",
    "to_gymnasium",
    "to_mdptoolbox",
    "to_quantecon",
    "write_prism",
]
