"""What a pass and a solve must cost at least, from stated constants: arithmetic, not measurement.

    python -m birl_bench.floors

prints the table of docs/performance.md. A kernel is described by two numbers, the bytes that it
must move and the operations that it must make; with a device's constants these give a floor. The
number of passes is that counted on a CPU, where it does not depend on the machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from birl_bench.report import digits, table

__all__ = ["H100", "H200", "SHAPES", "Device", "Prediction", "Shape", "kernels", "predict"]

WARP_REGISTERS = 32 * 32 * 4
"""Bytes of P that a warp keeps in registers, 32 per lane: then only the arithmetic takes time."""


@dataclass(frozen=True)
class Device:
    """Constants of a GPU. Data-sheet values, except those marked: to be measured first.

    Attributes:
        memory: bytes/s read from device memory, nine tenths of the data sheet.
        l2: bytes/s, assumed; l2_bytes: what of it can be kept, assumed.
        clock: Hz; shared_per_clock: bytes per clock and SM.
        shared: bytes of shared memory per SM; registers: bytes per SM usable for data.
        flops: float32 operations/s; doubles: the same for float64.
        launch, grid_sync: s, assumed.
    """

    name: str
    sms: int
    memory: float
    l2: float
    l2_bytes: float
    clock: float
    flops: float
    doubles: float
    shared: int = 227 * 1024
    registers: int = 160 * 1024
    shared_per_clock: int = 128
    launch: float = 3e-6
    grid_sync: float = 1.7e-6

    @property
    def chip(self) -> float:
        """bytes/s from shared memory of all SMs; registers are at least as fast."""
        return self.sms * self.shared_per_clock * self.clock

    @property
    def chip_bytes(self) -> float:
        return float(self.sms * (self.shared + self.registers))


H200 = Device("H200", 132, 4.3e12, 5.5e12, 42e6, 1.755e9, 67e12, 34e12)
H100 = Device("H100 SXM", 132, 3.0e12, 5.5e12, 42e6, 1.755e9, 67e12, 34e12)


@dataclass(frozen=True)
class Shape:
    """A benchmark's shape.

    Attributes:
        batch, states, actions, successors: successors is S where P is dense.
        entry: bytes of an entry of P; index: bytes of an index per (s, successor), shared by the
            actions; 0 if dense.
        passes: full passes of a certified solve, counted on a CPU; products: with P_π on top.
    """

    name: str
    batch: int
    states: int
    actions: int
    successors: int
    passes: float
    products: float = 0.0
    entry: int = 4
    index: int = 0

    @property
    def entries(self) -> int:
        return self.batch * self.states * self.actions * self.successors

    @property
    def bytes(self) -> float:
        """Of a pass over P."""
        return float(
            self.entries * self.entry + self.batch * self.states * self.successors * self.index
        )

    @property
    def operations(self) -> float:
        """Of a pass: 2 per entry, 4 per (s, a)."""
        return 2.0 * self.entries + 4.0 * self.batch * self.states * self.actions

    @property
    def policy_bytes(self) -> float:
        """Of a product with P_π."""
        per_state = min(self.successors * (self.entry + self.index), self.states * self.entry)
        return float(self.batch * self.states * per_state)


SHAPES = (
    Shape("256 × 32 × 8", 256, 32, 8, 32, passes=12),
    Shape("4096 × 16 × 4", 4096, 16, 4, 16, passes=14),
    Shape("100,000 × 16 × 4", 100_000, 16, 4, 16, passes=14),
    Shape("1 × 1000 × 10", 1, 1000, 10, 1000, passes=3, products=2),
    Shape("1 × 4096 × 16", 1, 4096, 16, 4096, passes=4),
    Shape("grid of 316², float64", 1, 316**2, 5, 5, passes=54, products=956, entry=8, index=4),
    Shape("grid of 1000², float64", 1, 10**6, 5, 5, passes=134, products=2551, entry=8, index=4),
)


@dataclass(frozen=True)
class Prediction:
    """Floors of one shape on one device, seconds.

    Attributes:
        memory, l2, chip: of a pass, from where P would lie; None where it does not fit.
        solve: of a certified solve: a launch, one read from memory, the other passes from the
            nearest level that holds P, and the grid synchronisations of a problem that all SMs
            share; mostly: the largest of these.
    """

    shape: Shape
    memory: float
    l2: float | None
    chip: float | None
    solve: float
    mostly: str


def predict(shape: Shape, device: Device) -> Prediction:
    """The roofline of a pass and of a solve."""
    arithmetic = shape.operations / (device.flops if shape.entry == 4 else device.doubles)
    memory = max(shape.bytes / device.memory, arithmetic)
    l2 = max(shape.bytes / device.l2, arithmetic) if shape.bytes <= device.l2_bytes else None
    chip = None
    if shape.bytes / shape.batch <= WARP_REGISTERS:
        chip = arithmetic
    elif shape.batch > 1 or shape.bytes <= device.chip_bytes:  # a batch passes through, MDP by MDP
        chip = max(shape.bytes / device.chip, arithmetic)
    levels = {"reading P": memory, "passes from L2": l2, "passes on chip": chip}
    where, near = min(
        ((name, level) for name, level in levels.items() if level is not None),
        key=lambda pair: pair[1],
    )
    again = shape.passes - 1
    sync = device.grid_sync if shape.batch == 1 else 0.0
    shares = {"launch": device.launch, "reading P": memory}
    shares[where] = shares.get(where, 0.0) + again * near
    shares["products"] = shape.products * _product(shape, device)
    shares["grid syncs"] = sync * (again + shape.products)
    solve = sum(shares.values())
    return Prediction(shape, memory, l2, chip, solve, max(shares, key=shares.__getitem__))


def _product(shape: Shape, device: Device) -> float:
    size = shape.policy_bytes
    if size <= device.chip_bytes:
        return size / device.chip
    return size / (device.l2 if size <= device.l2_bytes else device.memory)


def predictions(device: Device) -> str:
    """A Markdown table, microseconds."""
    head = ["shape, float32 unless said", "P, MB", "pass: from memory", "from L2", "on chip"]
    head += ["passes + products", f"solve on an {device.name}, at least", "mostly"]
    rows = []
    for shape in SHAPES:
        found = predict(shape, device)
        count = f"{shape.passes:g}" + (f" + {shape.products:g}" if shape.products else "")
        rows.append(
            [
                shape.name,
                digits(shape.bytes / 1e6),
                _micro(found.memory),
                _micro(found.l2),
                _micro(found.chip),
                count,
                _micro(found.solve),
                found.mostly,
            ]
        )
    return table(head, rows)


def kernels() -> str:
    """A Markdown table: bytes and operations of each kernel, per pass, in symbols."""
    head = "kernel", "reads and writes, bytes", "operations", "per byte, float32"
    return table(head, KERNELS)


KERNELS = (
    ("sweep, dense", "b·BSAS + (b + 24)·BSA + 16·BS", "2·BSAS + 4·BSA", "1/2"),
    ("solve of small MDPs", "b·BSAS once, then on chip", "(2·BSAS + 4·BSA)·n", "n/2"),
    ("solve of a large dense MDP", "b·SAS·n + b·SS·m", "(2·SAS + 4·SA)·n + 2·SS·m", "1/2"),
    ("sweep, CSR", "(b + 8)·nnz + 8·SA + (b + 24)·SA + 16·S", "2·nnz + 4·SA", "1/6"),
    ("product with P_π, sparse", "12·nnz_π + 16·S", "2·nnz_π", "1/6"),
    ("LU of I − γP_π, one per MDP", "8·BSS, on chip", "2/3·BS³", "S/12"),
    ("k right-hand sides", "b·SS + 16·kS per product", "2·kSS", "k/2"),
)
"""b: bytes of an entry; n: passes; m: products; tables of (s, a) leave in b-byte entries."""


def _micro(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    micro = 1e6 * seconds
    return f"{digits(micro)} µs" if micro < 1e4 else f"{digits(micro / 1e3)} ms"


def main() -> None:
    """Print the tables."""
    for device in (H200, H100):
        print(predictions(device), end="\n\n")
    print(kernels())


if __name__ == "__main__":
    main()
