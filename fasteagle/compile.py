"""How does a step become one launch? The only file that says torch.compile or CUDAGraph.

A *step* is a function without arguments that reads and writes the engine's static tensors: one
round, or one chunk of prefill. It is built for one cache bucket and for greedy or sampled choosing.

off    eager; the reference that the other two must equal
CPU    the whole step is one full graph (there is nothing to capture), which is called without
       Dynamo between (0.1 to 0.3 ms a call) and kept for the next process (step_files.py)
CUDA   the decoder block is compiled once for all layers (regional compilation), what follows the
       target as two small graphs, and the step is captured in one CUDA graph by hand: one launch a
       round, without the dispatch cost of a torch.compile call (about 0.3 ms each)
"""

from __future__ import annotations

import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from fasteagle import step_files
from fasteagle.errors import CompileError, first_line, ran_out_of_memory

Function = TypeVar("Function", bound=Callable[..., Any])
Step = Callable[[], None]
Building = Callable[[], AbstractContextManager[None]]  # around what builds a step
Mode = Literal["eager", "traced", "captured"]  # what becomes of a step

STEP_OPTIONS: dict[str, str | int | bool] = {
    "cpp_wrapper": True,  # calls kernels from C++: 10 % of a small model's step
    "cpp_cache_precompile_headers": False,  # 8 s once, for 1 s of g++ less a step
    # For the sums of panel.py: store what rows share, and let a product and a sum be one.
    "realize_reads_threshold": 1,
    "cpp.enable_floating_point_contract_flag": "fast",
    # The engine's tensors keep their addresses, shapes and dtypes for life.
    "size_asserts": False,
    "alignment_asserts": False,
    "scalar_asserts": False,
}
WARM_UP_RUNS = 3
before_tracing: list[Callable[[], object]] = []  # called once, when a CPU step was not kept


class NotCaptured(UserWarning):
    """A step runs as several launches because CUDA could not capture it as one."""


class Compiler:
    """The compile policy of one engine: what `--compile` means on its device."""

    def __init__(self, *, enabled: bool, device: torch.device) -> None:
        self.enabled, self.device = enabled, device
        self.captures = enabled and device.type == "cuda"
        self.traces = enabled and not self.captures  # a whole step is one Inductor graph
        self.seconds = 0.0  # in which steps were built, those of others that were waited for too
        if enabled:
            step_files.use_cache_folder()

    @property
    def mode(self) -> Mode:
        """What becomes of a step."""
        return "captured" if self.captures else "traced" if self.traces else "eager"

    @property
    def off(self) -> Compiler:
        """The policy that compiles nothing, on the same device."""
        return Compiler(enabled=False, device=self.device)

    def clock(self) -> float:
        """Seconds that pass, without those in which steps are built: the clock of requests."""
        return time.perf_counter() - self.seconds

    @contextmanager
    def building(self) -> Iterator[None]:
        """Around what builds a step; its errors are CompileErrors, but for a lack of memory."""
        begin = time.perf_counter()
        try:
            yield
        except RuntimeError as error:  # Dynamo's and Inductor's errors are
            if ran_out_of_memory(error):
                raise
            raise CompileError(f"compiling failed ({first_line(error)})") from error
        finally:
            self.seconds += time.perf_counter() - begin

    def part(self, function: Function, name: str) -> Function:
        """A region inside a step: compiled by itself where steps are captured, else left alone."""
        if not self.captures:
            return function
        return torch.compile(fresh(function, name), fullgraph=True, dynamic=False)  # type: ignore[return-value]

    def step(
        self,
        function: Step,
        name: str,
        state: Sequence[Tensor],
        rehearsal: Step | None = None,
    ) -> Step:
        """A whole step; `state` holds the tensors that it changes, apart from caches. rehearsal:
        the same without compiled parts, run once before they are, where steps are captured.
        """
        if not self.enabled:
            return function
        if self.captures:
            return CapturedStep(function, name, state, rehearsal, building=self.building)
        return TracedStep(function, name, building=self.building)


def fresh(function: Function, name: str) -> Function:
    """A copy of a Python function with a code object of its own.

    Dynamo keeps its cache on the code object: without a copy, the steps of two buckets or of two
    engines would count as recompiles of one function, and unguarded ones would be mistaken for it.
    """
    if isinstance(function, types.MethodType):  # a bare copy would lose its `self`
        return types.MethodType(fresh(function.__func__, name), function.__self__)  # type: ignore[return-value]
    copy = types.FunctionType(
        function.__code__.replace(co_name=name),
        function.__globals__,
        name,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy  # type: ignore[return-value]


def artifact_of(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """A traced step as Inductor's code, which can be called and kept."""
    from torch._inductor import standalone_compile

    return standalone_compile(
        graph,
        inputs,
        dynamic_shapes="from_example_inputs",
        options={"config_patches": dict(STEP_OPTIONS)},
    )


class TracedStep:
    """A step as one Inductor graph: read from a file or traced at its first call.

    From then on it is called with the very tensors of the first time, without guards or Dynamo.
    """

    def __init__(self, function: Step, name: str, *, building: Building = nullcontext) -> None:
        self.function, self.name, self.building = function, name, building
        self.call: Callable[..., object] | None = None
        self.inputs: list[Tensor] = []

    def __call__(self) -> None:
        if self.call is None:
            with self.building():
                self._prepare()
        assert self.call is not None
        self.call(*self.inputs)

    def _prepare(self) -> None:
        reached = step_files.reach(self.function)
        key = step_files.key_of(self.name, reached, STEP_OPTIONS)
        kept = step_files.read(key, reached, STEP_OPTIONS)
        if kept is None and before_tracing:
            while before_tracing:
                before_tracing.pop()()
            kept = step_files.read(key, reached, STEP_OPTIONS)
        if kept is not None:
            self.call, self.inputs = kept
            return
        artifact = self._trace()
        step_files.write(key, reached, artifact, self.inputs)
        self.call = artifact

    def _trace(self) -> Any:
        """Trace and compile the step without running it; keeps the tensors it is to be given."""
        artifacts = []

        def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            artifacts.append(artifact_of(graph, inputs))

            def hold(*tensors: Tensor) -> tuple[()]:
                self.inputs = list(tensors)
                return ()

            return hold

        traced = torch.compile(
            fresh(self.function, self.name),
            fullgraph=True,
            dynamic=False,
            backend=backend,
            options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
        )
        traced()
        return artifacts[0]


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A call that has run before, as one CUDA graph."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    # Calls of other threads (a page that streams text) are none of this capture's business. The
    # outer stream is for a capture that fails, which would leave its own behind.
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        given_back(pool),
        torch.cuda.graph(graph, pool, capture_error_mode="thread_local"),
    ):
        call()
    return graph


@contextmanager
def given_back(pool: tuple[int, int]) -> Iterator[None]:
    """Around a capture: end its use of the allocator when it fails, which torch 2.11 leaves open;
    then the next capture, or the next emptying of torch's cache, would fail as well.
    """
    try:
        yield
    except RuntimeError:
        with suppress(RuntimeError, AttributeError):  # newer torch has done it
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise


class CapturedStep:
    """A step in one CUDA graph, or in its compiled parts, with a warning, where that cannot be."""

    def __init__(
        self,
        function: Step,
        name: str,
        state: Sequence[Tensor],
        rehearsal: Step | None = None,
        *,
        building: Building = nullcontext,
    ) -> None:
        self.function, self.name, self.state = function, name, state
        self.rehearsal, self.building = rehearsal, building
        self.replay: Step | None = None

    def __call__(self) -> None:
        if self.replay is None:
            with self.building():
                self.replay = self._prepare()
        self.replay()

    def _prepare(self) -> Step:
        """Warm up (compiling the parts) and capture; `state` is as before afterwards.

        Caches need no copy: a step writes only behind the length that it started from.
        """
        with torch.cuda.device(self.state[0].device):  # streams are of the current device
            saved = [tensor.clone() for tensor in self.state]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._warm_up(saved)
            torch.cuda.current_stream().wait_stream(stream)
            replay = self._graph_or_parts()
            self._restore(saved)
            return replay

    def _graph_or_parts(self) -> Step:
        """The replay of the step's graph or, where it cannot be captured, its compiled parts."""
        try:
            return captured(self.function).replay
        except RuntimeError as error:
            if ran_out_of_memory(error):
                raise
            # The end of a capture that failed fails too.
            reason = first_line(error.__context__ or error)
            warnings.warn(
                f"the step {self.name} cannot be captured in one CUDA graph ({reason}); its "
                "compiled parts run one by one, which is right but slower; please report it",
                NotCaptured,
                stacklevel=2,
            )
            return self.function

    def _warm_up(self, saved: Sequence[Tensor]) -> None:
        runs = [self.function] * WARM_UP_RUNS
        for run in (self.rehearsal, *runs) if self.rehearsal else runs:
            run()
            self._restore(saved)

    def _restore(self, saved: Sequence[Tensor]) -> None:
        for tensor, copy in zip(self.state, saved, strict=True):
            tensor.copy_(copy)
