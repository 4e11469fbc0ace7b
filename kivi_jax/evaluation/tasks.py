"""Tasks of lm-evaluation-harness, answered through several caches."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kivi_jax.kv.config import KVConfig
from kivi_jax.model import Params

BOOTSTRAP = 1000  # resamples for the errors of metrics that are no means


@dataclasses.dataclass(frozen=True)
class Metric:
    """What the harness found.

    Attributes:
        value: of the metric.
        error: its standard error, None where the harness has none.
        samples: how many were answered.
    """

    value: float
    error: float | None
    samples: int


Metrics = dict[tuple[str, str], Metric]  # by task and name


class Tasks:
    """Tasks that the harness knows by name, or that YAML files describe.

    Raises:
        ValueError: the harness is not installed, or there is no such task or file.
    """

    def __init__(self, names: Sequence[str]) -> None:
        try:
            from lm_eval.tasks import TaskManager

            from kivi_jax.evaluation.harness import KiviLM
        except ImportError as error:
            raise ValueError(
                f"tasks need lm-evaluation-harness ({error}); pip install 'kivi-jax[eval]'"
            ) from error
        self._model = KiviLM
        files = [Path(name) for name in names if name.endswith((".yaml", ".yml"))]
        if missing := [str(file) for file in files if not file.is_file()]:
            raise ValueError(f"there is no file {missing[0]}")
        self.names = [Path(name).stem if Path(name) in files else name for name in names]
        folders = sorted({str(file.parent) for file in files})
        self._manager = TaskManager(
            include_path=folders or None,
            include_defaults=len(files) < len(names),  # reading their descriptions takes seconds
        )
        if unknown := [name for name in self.names if name not in self._manager.all_tasks]:
            raise ValueError(
                f"there is no task {unknown[0]!r}; lm_eval ls tasks lists the harness's, and a YAML file must be named "
                f"as the task in it"
            )

    def check(self, params: Params, chat: bool) -> None:
        """Finds out before anything is measured whether the model can be asked.

        Raises:
            ValueError: as `KiviLM`, or it has no chat template to be asked through.
        """
        model = self._model(params)
        if chat and not model.tokenizer.chat_template:
            raise ValueError("--chat asks through the model's chat template, and it has none")

    def measure(
        self,
        params: Params,
        configs: Mapping[str, KVConfig],
        limit: int | None,
        chat: bool,
        slots: int | None,
    ) -> Iterator[tuple[str, Metrics]]:
        """The metrics of each cache, of at most `limit` samples a task."""
        import lm_eval

        for name, config in configs.items():
            results = lm_eval.simple_evaluate(
                model=self._model(params, config, slots=slots),
                tasks=list(self.names),
                task_manager=self._manager,
                limit=limit,
                apply_chat_template=chat,
                bootstrap_iters=BOOTSTRAP,
            )
            yield name, _read_metrics(results)


def _read_metrics(results: Mapping[str, Any]) -> Metrics:
    found: Metrics = {}
    for task, metrics in results["results"].items():
        samples = results["n-samples"].get(task, {}).get("effective", 0)
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if not isinstance(value, float) or name.endswith("_stderr"):
                continue
            error = metrics.get(f"{name}_stderr,{kind}")
            label = name if kind == "none" else key
            found[task, label] = Metric(value, error if isinstance(error, float) else None, samples)
    return found
