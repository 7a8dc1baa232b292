"""Turning a budget round: the largest context, the most sequences, and the nearest changes that would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice

from l4pack.budget.devices import Device, Host
from l4pack.budget.load import Load, Setting, divides, longest_context
from l4pack.budget.model import Budget, assess, budget
from l4pack.budget.subject import Subject
from l4pack.errors import UsageError

GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)
MAX_CHANGES = 6
FEW_REQUESTS = 16
TOGETHER = {2: "both", 3: "all three"}
LARGER = 1.1  # a device counts as larger from here on


@dataclass(frozen=True)
class LargestLoads:
    """The largest loads that fit, at the dear end of the ranges and at the cheap one."""

    max_context: int
    max_context_high: int
    max_sequences: int
    max_sequences_high: int


@dataclass(frozen=True)
class Suggestion:
    """A change to the load that was tried and fits."""

    what: str
    option: str
    max_context: int
    headroom_bytes: int


def limits(found: Budget) -> LargestLoads:
    """The largest context at this load, and the most sequences at this context."""
    return LargestLoads(
        max_context(found, high=True),
        max_context(found, high=False),
        max_sequences(found, high=True),
        max_sequences(found, high=False),
    )


def max_context(found: Budget, *, high: bool = True) -> int:
    """The largest context that fits with everything else as it is, in whole blocks; 0 when none does."""
    setting, block = found.setting, found.runtime.block_size
    longest = min(longest_context(found.subject.config.text), setting.max_positions)
    room = _room(found, high=high)
    if room(replace(setting, context=longest)):
        return longest
    return block * _largest(longest // block, lambda count: room(replace(setting, context=count * block)))


def max_sequences(found: Budget, *, high: bool = True) -> int:
    """The most sequences that fit at this context; 0 when not even one does."""
    setting = found.setting
    room = _room(found, high=high)
    return _largest(setting.sequence_limit, lambda count: room(replace(setting, sequences=count)))


def _room(found: Budget, *, high: bool) -> Callable[[Setting], bool]:
    def fits(setting: Setting) -> bool:
        tried = assess(found.subject, found.host, found.runtime, setting)
        return tried.fits if high else tried.headroom_high_bytes >= 0

    return fits


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest count in 0..most that fits, where more never fits better."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def changes(
    found: Budget,
    load: Load,
    runtime: str,
    devices: Mapping[str, Device],
    others: Mapping[str, Callable[[], Subject]],
) -> list[Suggestion]:
    """The nearest changes that make it fit, each tried by running the model again; smallest change first."""
    tried = _Trial(found, load, runtime)
    candidates = (
        *tried.smaller_load(),
        *tried.leaner_runtime(),
        *tried.other_weights(others),
        *tried.more_hardware(devices),
    )
    return list(candidates)[:MAX_CHANGES]


@dataclass(frozen=True)
class _Trial:
    found: Budget
    load: Load
    runtime: str

    def smaller_load(self) -> Iterator[Suggestion]:
        """Less context; fewer sequences."""
        yield from self._fewer_layers()
        context = max_context(self.found)
        if 0 < context < self.found.setting.context:
            yield from self._try(f"context {context:,}", f"--context {context}", replace(self.load, context=context))
        count = max_sequences(self.found)
        if 0 < count < self.found.setting.sequences:
            yield from self._try(f"{count} sequences", f"--sequences {count}", replace(self.load, sequences=count))

    def _fewer_layers(self) -> Iterator[Suggestion]:
        """The most layers on the GPU that fit, of a runtime that can keep the others in the machine's own memory."""
        if self.found.runtime.kv != "llama.cpp" or self.found.host.device.unified:
            return
        setting = self.found.setting
        room = _room(self.found, high=True)
        most = _largest(
            self.found.subject.config.text.num_hidden_layers, lambda count: room(replace(setting, gpu_layers=count))
        )
        if most:
            yield from self._try(
                f"{most} layers on the GPU", f"--gpu-layers {most}", replace(self.load, gpu_layers=most)
            )

    def leaner_runtime(self) -> Iterator[Suggestion]:
        """FP8 KV, fewer request slots, a shorter position table, and all of them."""
        options = [option for option in (_fp8_kv(self), _fewer_requests(self), _shorter_table(self)) if option]
        together = self.load
        for what, flag, apply in options:
            together = apply(together)
            yield from self._try(what, flag, apply(self.load))
        if len(options) > 1:
            yield from self._try(TOGETHER[len(options)], " ".join(flag for _, flag, _ in options), together)

    def other_weights(self, others: Mapping[str, Callable[[], Subject]]) -> Iterator[Suggestion]:
        """Another recipe, the largest artifact that fits: at this load, or at the context it leaves room for."""
        subjects = [make() for name, make in others.items() if name != self.found.subject.recipe]
        subjects.sort(key=lambda subject: -subject.weight_bytes)
        same = (change for subject in subjects for change in self._recipe(subject, self.load))
        less = (change for subject in subjects for change in self._shortened(subject))
        yield from islice(chain(same, less), 1)

    def _recipe(self, subject: Subject, load: Load) -> Iterator[Suggestion]:
        name = subject.recipe
        yield from self._try(f"recipe {name}", f"--recipe {name}", load, subject=subject)

    def _shortened(self, subject: Subject) -> Iterator[Suggestion]:
        found = assess(subject, self.found.host, self.found.runtime, self.found.setting)
        context = max_context(found)
        if context > max_context(self.found):
            what, option = (
                f"recipe {subject.recipe}, {context:,} tokens",
                f"--recipe {subject.recipe} --context {context}",
            )
            yield from self._try(what, option, replace(self.load, context=context), subject=subject)

    def more_hardware(self, devices: Mapping[str, Device]) -> Iterator[Suggestion]:
        """More of the same device; larger devices, as many of them; failing both, more and larger ones."""
        host = self.found.host
        counts = [count for count in GPU_COUNTS if count > host.count]
        larger = [device for device in devices.values() if device.memory_bytes > LARGER * host.device.memory_bytes]
        larger.sort(key=lambda device: device.memory_bytes)
        more = self._first(Host(host.device, count) for count in counts)
        bigger = self._first(Host(device, host.count) for device in larger)
        both = sorted(
            (Host(device, count) for device in larger for count in counts),
            key=lambda host: (host.count, host.device.memory_bytes),
        )
        yield from (*more, *bigger)
        if not more and not bigger:
            yield from self._first(both)

    def _first(self, hosts: Iterable[Host]) -> list[Suggestion]:
        return list(islice((change for host in hosts for change in self._on(host)), 1))

    def _on(self, host: Host) -> Iterator[Suggestion]:
        if self.found.runtime.pipeline or divides(self.found.subject.config.text, host.count):
            yield from self._try(host.name, f"--device {host.name}", replace(self.load, tp=None, pp=None), host=host)

    def _try(
        self, what: str, option: str, load: Load, *, subject: Subject | None = None, host: Host | None = None
    ) -> Iterator[Suggestion]:
        try:
            found = budget(subject or self.found.subject, host or self.found.host, load, self.runtime)
        except UsageError:
            return  # the runtime would refuse this load: it is no way out
        if found.fits:
            yield Suggestion(what, option, max_context(found), found.headroom_bytes)


Option = tuple[str, str, Callable[[Load], Load]]


def _fp8_kv(trial: _Trial) -> Option | None:
    if trial.found.setting.kv_dtype == "fp8":
        return None
    return "FP8 KV cache", "--kv-dtype fp8", lambda load: replace(load, kv_dtype="fp8")


def _fewer_requests(trial: _Trial) -> Option | None:
    wanted = max(trial.found.setting.sequences, FEW_REQUESTS)
    if wanted >= trial.found.setting.max_num_seqs:
        return None
    return f"{wanted} request slots", f"--max-num-seqs {wanted}", lambda load: replace(load, max_num_seqs=wanted)


def _shorter_table(trial: _Trial) -> Option | None:
    """The table is made for `max_position_embeddings`, which an override of the configuration shortens."""
    context = trial.found.setting.context
    if not any(trial.found.runtime.rope_bytes) or context >= trial.found.setting.max_positions:
        return None
    what, flag = f"position table for {context:,}", f"--max-positions {context}"
    return what, flag, lambda load: replace(load, max_positions=context)
