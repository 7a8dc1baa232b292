"""A cluster under way: looking at its nodes, and tasks that are kept running on all of it."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from l4pack.cluster.options import ClusterOptions, Share
from l4pack.cluster.worker import Done, Opened, do
from l4pack.errors import BudgetError, ClusterError, UsageError
from l4pack.units import human_bytes
from l4pack.work.signals import check_stop

LOOK_SECONDS = 0.5  # between looks at who is there, and whether to stop
RETRIES = 5  # of a task whose worker or node is lost
_LOST_SECONDS = 60.0  # that nobody need be there who could go on
_SEEING_SECONDS = 120.0  # for a node to answer what it sees: its first worker loads everything
_RATES = 6  # workers whose rates are told one by one


@dataclass(frozen=True)
class Piece:
    """One task: its name on Ray's dashboard, what it is about, and what it costs beside the others."""

    name: str
    argument: Any
    cost: int = 1


@dataclass(frozen=True)
class Work:
    """What a job's tasks share: `work` does one with what `opening`, given `job`, has opened in the worker's process."""

    key: str
    opening: Callable[[Any], Opened]
    job: Any
    work: Callable[[Any, Any], Any]
    rate: Callable[[float], str] = human_bytes  # a worker's costs a second, in words


class Parcel:
    """Something larger that goes along with tasks, once to every node that does one."""

    def __init__(self, reference: Any) -> None:
        self._reference = reference

    def open(self) -> Any:
        """What is in it, in the process of whoever got it."""
        import ray

        return ray.get(self._reference)


class Cluster:
    """A cluster that this process is connected to."""

    def __init__(self, ray: Any, options: ClusterOptions, threads: int) -> None:
        """`ray` is the module, which nothing but this package imports."""
        self._ray, self.options, self.threads = ray, options, threads
        self._remote = ray.remote(_in_worker)
        self._jobs: dict[str, Parcel] = {}
        self._rates: dict[str, tuple[int, float]] = {}
        self._label: Callable[[str], None] = lambda _: None

    def show_on(self, label: Callable[[str], None]) -> None:
        """Tell `label` how fast each worker is."""
        self._label = label

    def check_nodes(self, look: Callable[[], Mapping[str, Any]], share: Share) -> None:
        """Hold what every node sees by `look`, which is sent there, against what this process sees.

        Raises UsageError naming a node and what differs there or is not there (None), BudgetError when no node has
        what a task takes.
        """
        self._check_share(share)
        asked, here, seen = self._ray.remote(_see), look(), {}
        for node in self._able(share):
            there = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            placed = asked.options(num_cpus=0, num_gpus=share.gpus, scheduling_strategy=there, name="look")
            seen[placed.remote(look)] = node
        _, silent = self._ray.wait(list(seen), num_returns=len(seen), timeout=_SEEING_SECONDS)
        for reference, node in seen.items():
            if reference in silent:
                raise ClusterError(
                    f"node {_name(node)} does not answer", hint="see `ray status`, and free or remove it"
                )
            if (sight := self._sight(reference)) is not None:
                _compare(_name(node), sight, here)

    def _sight(self, reference: Any) -> Mapping[str, Any] | None:
        """What a node sees; None where it is gone by now, and will do nothing of the job."""
        raised = self._ray.exceptions
        try:
            seen: Mapping[str, Any] = self._ray.get(reference)
        except (raised.TaskUnschedulableError, raised.NodeDiedError, raised.WorkerCrashedError):
            return None
        except raised.RayError as error:
            raise self._cause(error) from error
        return seen

    def run(
        self,
        work: Work,
        pieces: Iterable[Piece],
        share: Share,
        done: Callable[[Piece, Any], None],
        stop: threading.Event,
    ) -> None:
        """Do pieces, the costliest first, as many at once as the cluster takes; `done` gets each one's result, here.

        When asked to stop, or where one fails, those that run are waited for and told of. Raises what a task raised,
        StoppedError, ClusterError when nobody is left.
        """
        waiting = sorted(pieces, key=lambda piece: piece.cost)
        running: dict[Any, Piece] = {}
        failed: Exception | None = None
        alone_since: float | None = None
        self._rates = {}
        while waiting or running:
            slots = self._slots(share)
            while waiting and len(running) < slots and failed is None and not stop.is_set():
                piece = waiting.pop()
                running[self._submit(work, piece, share)] = piece
            if not running and (failed is not None or stop.is_set()):
                break
            alone_since = _patience(slots, alone_since)
            ready: list[Any] = []
            if running:
                ready, _ = self._ray.wait(list(running), num_returns=1, timeout=LOOK_SECONDS)
            else:  # nobody is there to do what waits
                stop.wait(LOOK_SECONDS)
            for reference in ready:
                piece = running.pop(reference)
                try:
                    found = self._result(reference)
                except Exception as error:
                    failed = failed or error
                    continue
                self._count(work, piece, found)
                done(piece, found.result)
        if failed is not None:
            raise failed
        check_stop(stop)

    def parcel(self, value: Any) -> Parcel:
        """Something to go along with tasks."""
        return Parcel(self._ray.put(value))

    def submit(self, work: Work, piece: Piece, share: Share) -> Future[Any]:
        """Have one piece done beside whatever runs; its result, or what it raised."""
        result: Future[Any] = Future()

        def tell(future: Future[Done]) -> None:
            error = future.exception()
            if error is None:
                result.set_result(future.result().result)
            else:
                result.set_exception(self._cause(error))

        self._submit(work, piece, share).future().add_done_callback(tell)
        return result

    def slots(self, share: Share) -> int:
        """How many tasks run at once. Raises BudgetError where no node has what one takes."""
        self._check_share(share)
        return self._slots(share)

    def hosts(self) -> int:
        """How many machines the nodes are on."""
        return len({node["NodeManagerHostname"] for node in self._ray.nodes() if node["Alive"]})

    def _submit(self, work: Work, piece: Piece, share: Share) -> Any:
        if work.key not in self._jobs:
            self._jobs[work.key] = self.parcel(work.job)
        remote = self._remote.options(
            num_cpus=share.cpus, num_gpus=share.gpus, memory=share.ram, max_retries=RETRIES, name=piece.name,
            scheduling_strategy="SPREAD",
        )  # fmt: skip
        return remote.remote(work.key, work.opening, self._jobs[work.key], work.work, piece.argument)

    def _result(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            raise self._cause(error) from error

    def _cause(self, error: BaseException) -> Exception:
        """What a task raised itself, or in one line what became of its worker."""
        cause = getattr(error, "cause", None)
        if isinstance(cause, Exception) and not isinstance(cause, self._ray.exceptions.RayError):
            return cause
        return ClusterError(
            f"a task was lost with its worker more than {RETRIES} times: {str(error).splitlines()[0]}",
            hint="see Ray's dashboard or logs; run the same command again to go on",
        )

    def _able(self, share: Share) -> list[dict[str, Any]]:
        """Nodes that are there and have what a task takes."""
        alive = (node for node in self._ray.nodes() if node["Alive"])
        return [node for node in alive if _fitting(node["Resources"], share)]

    def _slots(self, share: Share) -> int:
        return sum(_fitting(node["Resources"], share) for node in self._able(share))

    def _check_share(self, share: Share) -> None:
        if not self._able(share):
            gpus = f", {share.gpus:g} GPUs" if share.gpus else ""
            raise BudgetError(
                f"no node has {share.cpus} cores{gpus} and {human_bytes(share.ram)} of memory for a worker",
                hint="set OMP_NUM_THREADS to the cores a worker may take, and --gpus-per-worker to its devices",
            )

    def _count(self, work: Work, piece: Piece, found: Done) -> None:
        """Tell what each worker gets done in a second."""
        cost, seconds = self._rates.get(found.worker, (0, 0.0))
        self._rates[found.worker] = cost + piece.cost, seconds + found.seconds
        rates = sorted((cost / max(seconds, 1e-9) for cost, seconds in self._rates.values()), reverse=True)
        shown = ", ".join(work.rate(rate) for rate in rates[:_RATES])
        more = f" and {len(rates) - _RATES} slower" if len(rates) > _RATES else ""
        self._label(f"{len(rates)} workers: {shown}/s{more}")


def _see(look: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    return look()


def _in_worker(
    key: str, opening: Callable[[Any], Opened], job: Parcel, work: Callable[[Any, Any], Any], argument: Any
) -> Done:
    return do(key, lambda: opening(job.open()), work, argument)


def _patience(slots: int, alone_since: float | None) -> float | None:
    """Since when nobody is there. Raises ClusterError after a while of that."""
    if slots:
        return None
    now = time.monotonic()
    if alone_since is not None and now - alone_since > _LOST_SECONDS:
        raise ClusterError(
            "no node is left that could go on; what is finished is kept",
            hint="bring the nodes back, then run the same command again",
        )
    return alone_since or now


def _fitting(resources: Mapping[str, float], share: Share) -> int:
    """How many tasks a node runs at once."""
    wanted = (("CPU", share.cpus), ("GPU", share.gpus), ("memory", share.ram))
    return min(int(resources.get(name, 0) / most) for name, most in wanted if most)


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeName']})"


def _compare(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    differing: defaultdict[bool, list[str]] = defaultdict(list)
    for key, value in here.items():
        if there.get(key) != value:
            differing[there.get(key) is None].append(key)
    if unseen := differing[True]:
        raise UsageError(
            f"node {name} does not see {unseen[0]} as this machine does",
            hint="source, --out and --work must lie on a file system that every node has mounted at the same path",
        )
    if others := differing[False]:
        key = others[0]
        raise UsageError(
            f"node {name} differs: {key} is {there[key]} there and {here[key]} here",
            hint="install the same versions on every node, and take nodes of one kind",
        )
