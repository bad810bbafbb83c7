"""The steps of `initialize_checkpoint` that read and write: factors, then bases."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax

from jlora._progress import Progress
from jlora._types import PRNGKey
from jlora.checkpoints.adapter_files import write_job_adapter
from jlora.checkpoints.adapter_ranks import AdapterReport, RankWish
from jlora.checkpoints.checkpoint import Checkpoint
from jlora.checkpoints.differences import Operands, fill_store
from jlora.checkpoints.factor_store import (
    choose_module_ranks,
    plan_stored_adapter,
    read_spectra,
)
from jlora.checkpoints.initial_bases import (
    Plans,
    has_moved,
    write_bases,
    write_side_files,
)
from jlora.checkpoints.initial_factors import (
    BaseStorage,
    fill_initial_factors,
    make_initial_reader,
    report_initial_factors,
)
from jlora.checkpoints.modules import MatrixRef, StoredModule, list_matrices
from jlora.checkpoints.output_folder import OutputFolder
from jlora.checkpoints.quantized_bases import can_be_foreign
from jlora.checkpoints.window_store import WORK, WindowStore, list_window_files
from jlora.initializers.base import Initializer
from jlora.quantization.base import Format


@dataclasses.dataclass(frozen=True)
class InitRun:
    """The checked arguments of one run, and its steps."""

    source: Checkpoint
    modules: list[StoredModule]  # to adapt
    initializer: Initializer
    format: Format | None  # of the bases; None: as the model
    wish: RankWish
    max_rank: int
    key: PRNGKey  # consumed
    max_memory: int | None  # bytes
    progress: bool | None

    @functools.cached_property
    def _refs(self) -> list[MatrixRef]:
        return list_matrices(self.modules)

    @functools.cached_property
    def _moves(self) -> bool:
        return has_moved(self.initializer, self.modules, self.format)

    def count_bytes(self) -> int:
        """Return about how many bytes the job writes."""
        sizes = sum(sum(ref.module.shape) for ref in self._refs)
        base = self.source.num_bytes if self._moves else 0
        return 8 * self.max_rank * sizes + base

    def list_first_files(self) -> list[str]:
        """Return the files of the first stage, whose names no value decides."""
        if self.wish.rank is None:
            return list_window_files(self._refs, self.max_rank, "svd")
        ranks = self._limit_ranks(self.wish.rank)
        return list_window_files(self._list_refs(ranks), max(ranks.values()), "factors")

    def write_part(self, folder: OutputFolder) -> None:
        """Write the files of one of several processes, as far as others let it."""
        ranks = self._choose_ranks(folder)
        if ranks is None:
            return
        store = self._fill(folder, ranks)
        if self._moves and store.wait():
            self._write_bases(folder, store)

    def write_all(self, folder: OutputFolder, *, portable: bool) -> AdapterReport:
        """Write everything that is missing, and return the report."""
        ranks = self._choose_ranks(folder)
        assert ranks is not None  # nobody else is at work
        store = self._fill(folder, ranks)
        layout = plan_stored_adapter(self.modules, ranks, portable=portable)
        read = make_initial_reader(store, self.modules)
        write_job_adapter(folder, layout, read, prefix="adapter/")
        if self._moves:
            plans = self._write_bases(folder, store)
            write_side_files(
                folder,
                self.source,
                self.modules,
                self.initializer,
                plans,
                self.format,
            )

        report = report_initial_factors(store, self.modules, ranks)
        folder.drop(WORK)
        return report

    def _choose_ranks(self, folder: OutputFolder) -> dict[str, int] | None:
        """Return the rank of each module; None: other processes have the spectra."""
        if self.wish.rank is not None:
            return self._limit_ranks(self.wish.rank)

        store = WindowStore(folder, self._refs, self.max_rank, "svd")
        with self._show("spectra") as bar:
            fill_store(
                store,
                Operands(self.source, None),
                self.max_rank,
                jax.random.fold_in(self.key, 0),  # the factors take the key itself
                self.max_memory,
                bar,
            )
        if not store.wait():
            return None
        spectra = read_spectra(store, self.modules)
        ranks, _ = choose_module_ranks(spectra, self.modules, self.wish, {})
        limits = self._limit_ranks(self.max_rank)
        return {path: min(rank, limits[path]) for path, rank in ranks.items()}

    def _limit_ranks(self, rank: int) -> dict[str, int]:
        """Return the rank, or the largest one of the initializer, for each module."""
        return {
            module.path: min(rank, self.initializer.max_rank(*module.shape))
            for module in self.modules
        }

    def _fill(self, folder: OutputFolder, ranks: Mapping[str, int]) -> WindowStore:
        """Return the first factors of all modules with a rank, on disk."""
        store = WindowStore(
            folder, self._list_refs(ranks), max(ranks.values()), "factors"
        )

        with self._show("init") as bar:
            fill_initial_factors(
                store,
                self.source,
                self.initializer,
                ranks,
                self._choose_storage(),
                self.key,
                self.max_memory,
                bar,
            )
        return store

    def _choose_storage(self) -> BaseStorage:
        format = self.format
        is_foreign = format is not None and can_be_foreign(self.modules, format)
        return BaseStorage(format, is_foreign)

    def _write_bases(self, folder: OutputFolder, store: WindowStore) -> Plans:
        return write_bases(
            folder,
            self.source,
            self.modules,
            self.initializer,
            store,
            self.format,
            self.progress,
        )

    def _list_refs(self, ranks: Mapping[str, int]) -> list[MatrixRef]:
        return [ref for ref in self._refs if ref.module.path in ranks]

    def _show(self, description: str) -> Progress:
        total = len(self._refs)
        return Progress(description, total, enabled=self.progress, unit="matrices")
