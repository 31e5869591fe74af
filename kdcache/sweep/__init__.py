"""Many students over one store: a grid of runs, on the processes or GPUs at hand, in one table."""

from kdcache.sweep.jobs import Job, plan_jobs
from kdcache.sweep.report import Row, SweepResult, rows_of, write_results
from kdcache.sweep.run import default_processes, run_sweep
from kdcache.sweep.settings import StrategySettings, SweepConfig, load_sweep

__all__ = [
    "Job",
    "Row",
    "StrategySettings",
    "SweepConfig",
    "SweepResult",
    "default_processes",
    "load_sweep",
    "plan_jobs",
    "rows_of",
    "run_sweep",
    "write_results",
]
