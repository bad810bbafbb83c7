"""`resize_adapter` and `combine_adapters`: adapters from adapters."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jlora._progress import Progress
from jlora.checkpoints.adapter_files import write_job_adapter
from jlora.checkpoints.adapter_layout import (
    AdapterLayout,
    FactorShape,
    count_bytes,
    plan_adapter,
)
from jlora.checkpoints.adapter_ranks import (
    AdapterReport,
    ModuleReport,
    RankWish,
    check_wish,
    plan_report,
)
from jlora.checkpoints.adapter_sums import (
    check_sum_memory,
    fill_sums,
    find_dtypes,
    list_weighted,
    open_terms,
    read_sum,
)
from jlora.checkpoints.factor_store import (
    choose_module_ranks,
    make_factor_reader,
    plan_stored_adapter,
    read_spectra,
)
from jlora.checkpoints.memory import check_max_memory
from jlora.checkpoints.modules import list_matrices
from jlora.checkpoints.output_folder import (
    OutputFolder,
    check_target,
    identify,
)
from jlora.checkpoints.peft_config import CONFIG_NAME, MODEL_NAME
from jlora.checkpoints.shared_jobs import choose_part, choose_report, run_shared
from jlora.checkpoints.shared_output import JobFolder
from jlora.checkpoints.window_store import WORK, WindowStore

Path = str | os.PathLike[str]

# Entries of the first adapter's configuration that the new one keeps.
_KEPT = ("base_model_name_or_path", "task_type", "revision")


def resize_adapter(
    adapter: Path,
    output: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    portable: bool = True,
    max_memory: int | None = None,
    progress: bool | None = None,
    dry_run: bool = False,
) -> AdapterReport:
    """Write an adapter with smaller ranks, and return a report of each module.

    Each u @ v becomes its best approximation of the new rank, without ever being
    formed. A few modules are in memory at a time; a run that was interrupted goes on
    where it was.

    Args:
        adapter: folder of PEFT.
        output: folder to write; it must not exist.
        rank: of every module, or its present one if that is less. None: not by rank.
        energy: part of the squared norm to keep of each module, in (0, 1]. None: not by
            energy.
        budget: numbers in all the factors; ranks go where they keep most. None: not by
            budget.
        portable: as in `save_peft`.
        max_memory: bytes of the process, with about 200 MiB for JAX itself. None: no
            limit.
        progress: None: a bar on a terminal, plain lines elsewhere. False: neither.
        dry_run: only check, and return the largest ranks that there may be, with NaN
            for unknown numbers.

    Returns:
        `AdapterReport`; a module of rank 0 is left out.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: not exactly one of rank, energy and budget, or any that `load_peft`
            and `save_peft` refuse.

    Accuracy: as `recompress`.

    Example:
        >>> import jax, tempfile, jlora
        >>> folder = tempfile.TemporaryDirectory()
        >>> old, new = f"{folder.name}/old", f"{folder.name}/new"
        >>> u = jax.random.normal(jax.random.key(0), (8, 4))
        >>> jlora.save_peft(old, {"q_proj": jlora.Factors(u, u.T)})
        >>> report = jlora.checkpoints.resize_adapter(old, new, rank=2)
        >>> report.modules[0].old_rank, report.modules[0].rank
        (4, 2)
        >>> folder.cleanup()
    """
    wish = check_wish(rank, energy, budget)
    job = _Job({adapter: 1.0}, wish, portable, max_memory, progress)
    return job.run(output, dry_run)


def combine_adapters(
    adapters: Mapping[Any, float],
    output: Path,
    *,
    rank: int | None = None,
    portable: bool = True,
    max_memory: int | None = None,
    progress: bool | None = None,
    dry_run: bool = False,
) -> AdapterReport:
    """Write the weighted sum of adapters as one adapter, and return a report.

    The deltas are added, Σ wᵢ uᵢ vᵢ. PEFT's "linear" adds the factors, which also gives
    the cross terms uᵢ vⱼ.

    Args:
        adapters: {folder: weight}. A module that some do not have is taken from the
            others.
        output: folder to write; it must not exist.
        rank: truncate the sum to this rank. None: exact, with the sum of the ranks.
        portable: as in `save_peft`.
        max_memory: bytes of the process, with about 200 MiB for JAX itself. None: no
            limit.
        progress: None: a bar on a terminal, plain lines elsewhere. False: neither.
        dry_run: only check, and return the largest ranks that there may be, with NaN
            for unknown numbers.

    Returns:
        `AdapterReport`.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: no adapter, modules of other shapes, or any that `load_peft`
            and `save_peft` refuse.

    Example:
        >>> import jax.numpy as jnp, tempfile, jlora
        >>> folder = tempfile.TemporaryDirectory()
        >>> one, two, new = (f"{folder.name}/{i}" for i in range(3))
        >>> for path in (one, two):
        ...     ones = jlora.Factors(jnp.ones((2, 1)), jnp.ones((1, 2)))
        ...     jlora.save_peft(path, {"q_proj": ones})
        >>> _ = jlora.checkpoints.combine_adapters({one: 0.5, two: 2.0}, new, rank=1)
        >>> u, v = jlora.load_peft(new)[0]["q_proj"]
        >>> float((u @ v)[0, 0].round(5))
        2.5
        >>> folder.cleanup()
    """
    wish = None if rank is None else check_wish(rank, None, None)
    job = _Job(adapters, wish, portable, max_memory, progress)
    return job.run(output, dry_run)


class _Job:
    """A weighted sum of adapters, exact or with chosen ranks.

    Args:
        adapters: {folder: weight}.
        wish: of the ranks; None: exact.
        portable: as in `save_peft`.
        max_memory: of the job in bytes.
        progress: of the bar.
    """

    def __init__(
        self,
        adapters: Mapping[Any, float],
        wish: RankWish | None,
        portable: bool,
        max_memory: int | None,
        progress: bool | None,
    ) -> None:
        self._weighted = list_weighted(adapters)
        self._terms, self._modules = open_terms(self._weighted)
        self._ranks = {
            path: sum(file.modules[path].rank for file, _ in self._terms[path])
            for path in self._terms
        }
        self._wish = wish
        self._portable = portable
        self._max_memory = check_max_memory(max_memory)
        self._progress = progress
        check_sum_memory(self._modules, self._ranks, self._max_memory)

    def run(self, output: Path, dry_run: bool) -> AdapterReport:
        """Write the new adapter, and return its report."""
        folders = [path for path, _ in self._weighted]
        check_target(pathlib.Path(output).absolute(), folders)
        if dry_run:
            return self._plan()

        names = (CONFIG_NAME, MODEL_NAME)
        job = {
            "job": "sum",
            "inputs": [identify(path / name) for path in folders for name in names],
            "weights": [weight for _, weight in self._weighted],
            "wish": self._wish,
            "portable": self._portable,
        }
        layout = plan_adapter(self._shapes, portable=self._portable)
        place = JobFolder(output, folders, 2 * count_bytes(layout), job)

        def write(folder: OutputFolder) -> AdapterReport:
            if self._wish is None:
                return self._write_exact(folder, layout)
            return self._write_thin(folder, self._wish)

        # Of several processes the first one does this small job, and all return then.
        part = choose_part(None)
        report = run_shared(place, part, [], lambda folder: None, write)
        return choose_report(report, part)

    @property
    def _shapes(self) -> dict[str, FactorShape]:
        """Sizes of the exact factors."""
        return {
            module.path: FactorShape(
                *module.shape, self._ranks[module.path], module.num_experts
            )
            for module in self._modules
        }

    def _plan(self) -> AdapterReport:
        """Return the report of a dry run."""
        sizes = {}
        for module in self._modules:
            rank = self._ranks[module.path]
            limit = rank if self._wish is None else min(rank, *module.shape)
            sizes[module.path] = (rank, limit)
        most = max(self._ranks.values())
        return plan_report(sizes, (self._wish and self._wish.rank) or most)

    def _write_exact(
        self, folder: OutputFolder, layout: AdapterLayout
    ) -> AdapterReport:
        total = len(layout.shapes)
        with Progress("combine", total, enabled=self._progress, unit="modules") as bar:

            def read(path: str) -> Any:
                bar.count()
                return read_sum(self._terms[path], path)

            write_job_adapter(folder, layout, read, config=self._make_config())
        rows = [ModuleReport(path, r, r, 1.0, 0.0) for path, r in self._ranks.items()]
        return AdapterReport(tuple(rows))

    def _write_thin(self, folder: OutputFolder, wish: RankWish) -> AdapterReport:
        refs = list_matrices(self._modules)
        rank = wish.rank or max(self._ranks.values())
        store = WindowStore(folder, refs, rank, "svd")
        with Progress(
            "resize", len(refs), enabled=self._progress, unit="matrices"
        ) as bar:
            fill_sums(store, self._terms, wish.rank, self._max_memory, bar)

        spectra = read_spectra(store, self._modules)
        ranks, report = choose_module_ranks(spectra, self._modules, wish, self._ranks)
        if not ranks:
            raise ValueError(
                "`rank`, `energy` or `budget` must leave a rank above 0, got none for "
                "any module. Raise the budget, or look for an adapter of zeros."
            )
        layout = plan_stored_adapter(
            self._modules,
            ranks,
            portable=self._portable,
            dtypes=find_dtypes(self._terms),
        )
        read = make_factor_reader(store, self._modules, ranks)
        write_job_adapter(folder, layout, read, config=self._make_config())
        folder.drop(WORK)
        return report

    def _make_config(self) -> dict[str, Any]:
        first = next(iter(self._terms.values()))[0][0].config
        return {name: first[name] for name in _KEPT if first.get(name) is not None}
