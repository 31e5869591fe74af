"""Does distillation help a flexible molecule beyond the temperature it was trained at?

Trained on 500 frames at 300 K, errors on frames at 300, 600 and 1200 K.

python benchmarks/study_3bpa.py --data DIR -o study-3bpa
"""

from study import Study, arguments, run_study

THREE_BPA = Study(
    teacher="3bpa_teacher",
    student="3bpa_student",
    files=("train_300K.extxyz",),
    test_file="train_mixedT.extxyz",
    group_key=None,
    cutoff=5.0,
    max_force=None,
    # Chosen on the validation split, with a seed that is none of the study's.
    weights={"n2n": 3.0, "v2v": 3_000.0, "vanilla1": 1.0, "vanilla2": 30.0},
    few_labels={0.1: ("optimizer.lr=1e-2",)},
)

if __name__ == "__main__":
    run_study(
        THREE_BPA,
        arguments().parse_args(),
        strategies=(
            "control",
            "vanilla1",
            "vanilla2",
            "n2n+v2v",
            "annealed",
            "control, annealed",
        ),
        labels=(1.0, 0.1),
        steps=2000,
    )
