"""Writes what lm-evaluation-harness's own `hf` model answers to the tasks in tests/data/harness, for the tests.

    pip install torch==2.13.0 accelerate
    python -m scripts.make_harness_golden

The demo model in float32, with positions so few that texts are cut.
"""

import json
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).resolve().parent.parent
TASKS = ROOT / "tests" / "data" / "harness"  # whose files are named from the root
MOST_POSITIONS = 256


def answers(model: Any) -> dict[str, Any]:
    """What a model answers to each question of each task, and the tasks' metrics."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model=model,
        tasks=sorted(path.stem for path in TASKS.glob("*.yaml")),
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    return {
        task: {
            "answers": [sample["filtered_resps"] for sample in samples],
            "metrics": {
                name: value
                for name, value in results["results"][task].items()
                if isinstance(value, float) and "stderr" not in name
            },
        }
        for task, samples in results["samples"].items()
    }


def main() -> None:
    """Writes tests/data/harness/expected.json."""
    from lm_eval.models.huggingface import HFLM

    model = HFLM(
        pretrained="assets/demo", dtype="float32", device="cpu", max_length=MOST_POSITIONS, batch_size=2
    )
    golden = json.dumps(answers(model), indent=1, default=float)
    (TASKS / "expected.json").write_text(golden + "\n", encoding="utf-8")
    print(golden)


if __name__ == "__main__":
    typer.run(main)
