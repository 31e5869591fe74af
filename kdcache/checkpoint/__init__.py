"""Runs on disk: the model for use, and everything needed to continue the run."""

from kdcache.checkpoint.files import (
    MODEL_CARD,
    MODEL_WEIGHTS,
    read_json,
    state_directories,
    write_json,
    write_text,
)
from kdcache.checkpoint.model import (
    load_potential,
    potential_card,
    potential_digest,
    save_potential,
)
from kdcache.checkpoint.resuming import check_state, load_optimizer_state, optimizer_state
from kdcache.checkpoint.states import (
    State,
    check_identity,
    check_run_directory,
    load_state,
    refuse_foreign_run,
    save_state,
    state_to_go_on_from,
    training_seconds,
)

__all__ = [
    "MODEL_CARD",
    "MODEL_WEIGHTS",
    "State",
    "check_identity",
    "check_run_directory",
    "check_state",
    "load_optimizer_state",
    "load_potential",
    "load_state",
    "optimizer_state",
    "potential_card",
    "potential_digest",
    "read_json",
    "refuse_foreign_run",
    "save_potential",
    "save_state",
    "state_directories",
    "state_to_go_on_from",
    "training_seconds",
    "write_json",
    "write_text",
]
