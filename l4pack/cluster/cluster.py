"""A cluster under way: looking at its nodes, and tasks that are kept running on all of it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from l4pack.cluster.options import ClusterOptions, Share
from l4pack.cluster.sight import NodeDiffersError, compare
from l4pack.cluster.worker import Done, Opened, do
from l4pack.errors import BudgetError, ClusterError
from l4pack.units import human_bytes
from l4pack.work.signals import check_stop

LOOK_SECONDS = 0.5  # between looks at who is there, and whether to stop
RETRIES = 5  # of a task whose worker or node is lost
_LOST_SECONDS = 60.0  # that nobody need be there who could go on
_SEEING_SECONDS = 120.0  # for a node to answer what it sees: its first worker loads everything
_RATES = 6  # workers whose rates are told one by one
_NODE_LABEL = "ray.io/node-id"
_SHOWN_OF_ID = 12


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
    title: str = ""  # what is done, for whoever looks on


@dataclass(frozen=True)
class _Unfit:
    """A node that did not do a task, for it does not see what it must."""

    node: str
    error: NodeDiffersError


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
        self._warn: Callable[[str], None] = lambda _: None
        self._sight: Parcel | None = None  # of the job under way
        self._unfit: dict[str, NodeDiffersError] = {}

    def show_on(self, label: Callable[[str], None], warn: Callable[[str], None] = lambda _: None) -> None:
        """Tell `label` how fast each worker is, and `warn` of nodes that are left out."""
        self._label, self._warn = label, warn

    def check_nodes(self, look: Callable[[], Mapping[str, Any]], share: Share) -> None:
        """Hold what every node sees by `look`, which is sent there, against what this process sees.

        A node that joins later is asked before its first task, and gets none if it differs.

        Raises UsageError naming a node and what differs there or is not there (None), BudgetError when no node has
        what a task takes.
        """
        self._unfit.clear()
        self._sight = None  # a refused job's must not be asked of the tasks of another
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
            if (sight := self._seen(reference)) is not None:
                compare(_name(node), sight, here)
        self._sight = self.parcel((look, here))

    def _seen(self, reference: Any) -> Mapping[str, Any] | None:
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
        self._rates, total = {}, len(waiting)
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
                if isinstance(found, _Unfit):
                    failed = failed or self._leave_out(found, share)
                    waiting.append(piece)
                    continue
                self._count(piece, found)
                done(piece, found.result)
                self._show(work, total - len(waiting) - len(running), total)
        if failed is not None:
            raise failed
        check_stop(stop)

    def parcel(self, value: Any) -> Parcel:
        """Something to go along with tasks."""
        return Parcel(self._ray.put(value))

    def submit(self, work: Work, piece: Piece, share: Share) -> Future[Any]:
        """Have one piece done beside whatever runs; its result, or what it raised."""
        result: Future[Any] = Future()

        def tell(future: Future[Done | _Unfit]) -> None:
            error = future.exception()
            if error is not None:
                result.set_exception(self._cause(error))
            elif not isinstance(found := future.result(), _Unfit):
                result.set_result(found.result)
            elif (failed := self._leave_out(found, share)) is not None:
                result.set_exception(failed)
            else:
                begin()

        def begin() -> None:
            self._submit(work, piece, share).future().add_done_callback(tell)

        begin()
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
        others = {_NODE_LABEL: f"!in({','.join(self._unfit)})"} if self._unfit else None
        remote = self._remote.options(
            num_cpus=share.cpus, num_gpus=share.gpus, memory=share.ram, max_retries=RETRIES, name=piece.name,
            scheduling_strategy="SPREAD", label_selector=others,
        )  # fmt: skip
        return remote.remote(work.key, work.opening, self._jobs[work.key], self._sight, work.work, piece.argument)

    def _leave_out(self, unfit: _Unfit, share: Share) -> Exception | None:
        """Give a node no more tasks; what to raise where it was the last."""
        if unfit.node not in self._unfit:
            self._unfit[unfit.node] = unfit.error
            self._warn(f"{unfit.error.message}: it joined late, and gets no task")
        return None if self._able(share) else unfit.error

    def _result(self, reference: Any) -> Done | _Unfit:
        try:
            found: Done | _Unfit = self._ray.get(reference)
            return found
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
        alive = (node for node in self._ray.nodes() if node["Alive"] and node["NodeID"] not in self._unfit)
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

    def _count(self, piece: Piece, found: Done) -> None:
        """Know what each worker gets done in a second."""
        cost, seconds = self._rates.get(found.worker, (0, 0.0))
        self._rates[found.worker] = cost + piece.cost, seconds + found.seconds

    def _show(self, work: Work, done: int, total: int) -> None:
        """Tell what each worker gets done in a second."""
        rates = sorted((cost / max(seconds, 1e-9) for cost, seconds in self._rates.values()), reverse=True)
        shown = ", ".join(work.rate(rate) for rate in rates[:_RATES])
        more = f" and {len(rates) - _RATES} slower" if len(rates) > _RATES else ""
        title = f"{work.title}, {done} of {total} tasks, " if work.title else ""
        self._label(f"{title}{len(rates)} workers: {shown}/s{more}")


def _see(look: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    return look()


def _in_worker(
    key: str,
    opening: Callable[[Any], Opened],
    job: Parcel,
    sight: Parcel | None,
    work: Callable[[Any, Any], Any],
    argument: Any,
) -> Done | _Unfit:
    """What runs in a worker: one task, before the first of a job a look at what its node sees."""
    import ray

    node = ray.get_runtime_context().get_node_id()

    def opened() -> Opened:
        if sight is not None:
            look, here = sight.open()
            compare(f"{socket.gethostname()} ({node[:_SHOWN_OF_ID]})", look(), here)
        return opening(job.open())

    try:
        return do(key, opened, work, argument)
    except NodeDiffersError as error:
        return _Unfit(node, error)


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
