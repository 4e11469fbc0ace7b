"""Tasks of lm-evaluation-harness, answered through several caches."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kivi_jax.kv.config import KVConfig
from kivi_jax.model import Params

Metrics = dict[tuple[str, str], float]  # by task and name


class Tasks:
    """Tasks that the harness knows by name, or that YAML files describe.

    Raises:
        ValueError: the harness is not installed, or there is no such task or file.
    """

    def __init__(self, names: Sequence[str]) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ValueError("tasks need lm-evaluation-harness; pip install 'kivi-jax[eval]'") from error
        files = [Path(name) for name in names if name.endswith((".yaml", ".yml"))]
        if missing := [str(file) for file in files if not file.is_file()]:
            raise ValueError(f"there is no file {missing[0]}")
        self.names = [Path(name).stem if Path(name) in files else name for name in names]
        folders = sorted({str(file.parent) for file in files})
        self.manager = TaskManager(
            include_path=folders or None,
            include_defaults=len(files) < len(names),  # reading their descriptions takes seconds
        )
        if unknown := [name for name in self.names if name not in self.manager.all_tasks]:
            raise ValueError(
                f"there is no task {unknown[0]!r}; lm_eval ls tasks lists the harness's, and a YAML file must be named "
                f"as the task in it"
            )

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

        from kivi_jax.evaluation.harness import KiviLM

        for name, config in configs.items():
            results = lm_eval.simple_evaluate(
                model=KiviLM(params, config, slots=slots),
                tasks=list(self.names),
                task_manager=self.manager,
                limit=limit,
                apply_chat_template=chat,
                bootstrap_iters=0,
            )
            yield name, _metrics(results["results"])


def _metrics(results: Mapping[str, Mapping[str, Any]]) -> Metrics:
    return {
        (task, metric.removesuffix(",none")): value
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "stderr" not in metric
    }
