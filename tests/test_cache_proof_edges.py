"""The proof of the cache for what stands on edges: e2e, e2n and v2v from edges, n2n beside them.

The online side finds each edge of the student among the teacher's by a dictionary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.config import StudentConfig
from kdcache.distill.strategies import apply_strategy
from kdcache.dump import DumpOptions, dump_teacher
from kdcache.errors import ConfigError
from kdcache.models import build_model
from kdcache.store import Store, open_store
from kdcache.stream.window import collate
from kdcache.structures import Batch, Graph
from kdcache.teachers import NativeTeacher
from kdcache.train import train_student
from tests.chain import PAINN, loss_curve, make_potential, make_store, student
from tests.dump.test_edges import make_teacher
from tests.edge_model import EDGENET, install
from tests.test_cache_proof import CLAIM, Teach, taught, train_online

pytestmark = pytest.mark.proof

STEPS = 12
# As small as a GemNet-OC gets with every kind of its messages.
GEMNET = {
    "name": "gemnet-oc", "num_spherical": 3, "num_radial": 6, "num_blocks": 1,
    "emb_size_atom": 8, "emb_size_edge": 8, "emb_size_trip_in": 4, "emb_size_trip_out": 4,
    "emb_size_quad_in": 4, "emb_size_quad_out": 4, "emb_size_aint_in": 4, "emb_size_aint_out": 4,
    "emb_size_rbf": 4, "emb_size_cbf": 4, "emb_size_sbf": 4, "num_before_skip": 1,
    "num_after_skip": 1, "num_atom": 1, "num_output_afteratom": 1, "num_atom_emb_layers": 1,
    "num_global_out_layers": 1, "cutoff": 3.0, "max_neighbors": 8, "max_neighbors_qint": 4,
}  # fmt: skip
WEIGHTS = {"n2n": 10.0, "e2n": 10.0, "v2v": 10.0, "e2e": 10.0}
# The student's own graph: the teacher's, a part of it, more than it, other neighbours.
STUDENTS = {
    "same": dict(EDGENET),
    "subset": {**EDGENET, "cutoff": 2.0},
    "superset": {**EDGENET, "cutoff": 3.6},
    "limited": {**EDGENET, "cutoff": 3.4, "max_neighbors": 4},
}

Setting = tuple[Store, NativeTeacher]


@pytest.fixture(scope="module", autouse=True)
def edgenet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The model of the tests, installed as another package's would be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(install(tmp_path_factory.mktemp("site")))
        yield


@pytest.fixture(scope="module", params=["float64", "float32"])
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """A store with everything a teacher with edges gives, whole edges included."""
    directory = tmp_path_factory.mktemp(request.param)
    store = make_store(directory)
    teacher = make_teacher(getattr(torch, request.param))
    fields = [spec.name for spec in teacher.field_specs()]
    options = DumpOptions("teacher", fields, "exact", threads=1)
    dump_teacher(store.path, teacher, options)
    return open_store(store.path), teacher


@pytest.fixture(scope="module")
def gemnet(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """A store with everything a GemNet-OC gives, whole edges included, in float64."""
    store = make_store(tmp_path_factory.mktemp("gemnet"))
    teacher = NativeTeacher(make_potential(GEMNET, dtype=torch.float64))
    fields = [spec.name for spec in teacher.field_specs()]
    options = DumpOptions("teacher", fields, "exact", threads=1)
    dump_teacher(store.path, teacher, options)
    return open_store(store.path), teacher


def configuration(
    strategy: str, dtype: torch.dtype, model: dict[str, object], *overrides: str
) -> StudentConfig:
    precision = str(dtype).removeprefix("torch.")
    base = student(
        f"training.max_steps={STEPS}", f"training.precision={precision}", *overrides, model=model
    )
    weights = {name: WEIGHTS[name] for name in strategy.split("+")}
    return apply_strategy(base, strategy, weights=weights, teacher_fields=["node", "edge"])


def agreement(
    setting: Setting, config: StudentConfig, run: Path, teach: Teach | None = None
) -> float:
    store, teacher = setting
    train_student(store.path, run, config)
    online = np.array(train_online(store, teacher, config, teach))
    cached = np.array(loss_curve(run), float)
    assert len(cached) == len(online) == len(set(cached)) == STEPS
    return float(np.max(np.abs(cached / online - 1)))


@pytest.mark.parametrize("strategy", ["e2n", "v2v", "n2n+e2n+v2v"])
def test_what_is_summed_at_the_atoms_teaches_the_same_from_the_store(
    strategy: str, setting: Setting, tmp_path: Path
) -> None:
    config = configuration(strategy, setting[1].dtype, dict(PAINN))
    fields = {term.name: term.teacher for term in config.terms}
    assert {"e2n": "edge_to_node", "v2v": "edge_to_vector"}.items() & fields.items()
    worst = agreement(setting, config, tmp_path / "run")
    print("WORST", strategy, setting[1].dtype, worst)
    assert worst < CLAIM[config.training.precision]


@pytest.mark.parametrize("name", STUDENTS)
def test_e2e_teaches_the_same_from_the_store_on_any_graph_of_the_student(
    name: str, setting: Setting, tmp_path: Path
) -> None:
    model = STUDENTS[name]
    config = configuration("e2e", setting[1].dtype, model, "data.min_edge_coverage=0.1")
    worst = agreement(setting, config, tmp_path / "run", matched_online(model))
    print("WORST", name, setting[1].dtype, worst)
    assert worst < CLAIM[config.training.precision]


@pytest.mark.parametrize(
    ("strategy", "model"),
    [
        ("n2n+e2n+v2v", PAINN),
        ("e2e", {**GEMNET, "emb_size_edge": 6}),
        ("n2n+e2e", {**GEMNET, "emb_size_edge": 6, "cutoff": 3.4, "max_neighbors": 5}),
    ],
    ids=["painn", "gemnet-oc-small", "gemnet-oc-small on another graph"],
)
def test_a_gemnet_oc_teaches_the_same_from_the_store(
    strategy: str, model: dict[str, object], gemnet: Setting, tmp_path: Path
) -> None:
    config = configuration(strategy, torch.float64, model, "data.min_edge_coverage=0.1")
    worst = agreement(gemnet, config, tmp_path / "run", matched_online(model))
    print("WORST", strategy, worst)
    assert worst < CLAIM["float64"]


def matched_online(model: Mapping[str, object]) -> Teach:
    """Batches on the student's graph, the teacher's features found edge by edge."""
    own_model = build_model(model)

    def teach(
        store: Store, rows: np.ndarray, teacher: NativeTeacher, references: dict[int, float]
    ) -> Batch:
        theirs = taught(store, rows, teacher, references)
        structures = [store.structure(int(row)) for row in rows]
        dtype = np.float64 if teacher.dtype == torch.float64 else np.float32
        own = collate(structures, own_model.graph_rule, dtype, further=own_model.further_graphs)
        known = {
            identity: k
            for k, identity in enumerate(identities(theirs.edge_index, theirs.edge_shift))
        }
        edge = theirs.teacher["teacher/edge"]
        nothing = torch.full((edge.shape[1],), torch.nan, dtype=edge.dtype)
        found = [
            edge[known[identity]] if identity in known else nothing
            for identity in identities(own.edge_index, own.edge_shift)
        ]
        return replace(
            theirs,
            edge_index=own.edge_index,
            edge_shift=own.edge_shift,
            graphs=own.graphs,
            teacher={**theirs.teacher, "teacher/edge": torch.stack(found)},
        )

    return teach


def identities(*graph: torch.Tensor) -> list[tuple[int, ...]]:
    index, shift = Graph(*graph)
    return [(*edge, *s) for edge, s in zip(index.T.tolist(), shift.int().tolist(), strict=True)]


def test_the_claim_is_sharp_enough_to_see_edges_taken_by_their_place(
    setting: Setting, tmp_path: Path
) -> None:
    config = configuration("e2e", setting[1].dtype, STUDENTS["same"])

    def misplaced(
        store: Store, rows: np.ndarray, teacher: NativeTeacher, references: dict[int, float]
    ) -> Batch:
        batch = taught(store, rows, teacher, references)
        rolled = batch.teacher["teacher/edge"].roll(1, dims=0)
        return replace(batch, teacher={**batch.teacher, "teacher/edge": rolled})

    assert agreement(setting, config, tmp_path / "run", misplaced) > 1e-4


def test_a_student_whose_edges_the_teacher_lacks_is_refused(
    setting: Setting, tmp_path: Path
) -> None:
    config = configuration("e2e", setting[1].dtype, {**EDGENET, "cutoff": 6.0})
    with pytest.raises(ConfigError, match=r"lower data\.min_edge_coverage"):
        train_student(setting[0].path, tmp_path / "run", config)
    assert not (tmp_path / "run" / "config.yaml").exists()
