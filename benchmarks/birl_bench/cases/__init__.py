"""One file per question; each has ``run(plan)``, which returns the measured cases."""
