"""A pretended GPU for the tests: everything runs on the CPU, and is held to the rules of a GPU.

    with PretendedGPU() as gpu:
        policy = oel.load_policy(folder, gpu.device)
        oel.drive(policy.model, generators, ...)
    gpu.waits          # how often each line of the program made the host wait for the GPU
    gpu.peak           # most bytes that were alive on the GPU

Each tensor's memory is on one side, the host's or the GPU's. These are the rules:
  * An operation takes tensors of one side; a number that is a tensor of no dimensions may come from the other.
  * What makes the host wait is counted: .item(), .tolist(), boolean indices, copies that are not non_blocking.
  * A non-blocking copy to the host holds garbage until an event that was recorded after it is synchronized.
  * A CUDA graph records operations and does nothing yet. It may not wait, and reads nothing of the host. A replay runs
    the recorded operations on the recorded memory, with the Python numbers of that time.
  * Rows of a half-precision matrix product should start at multiples of 16 bytes, else its kernel is slow (`unaligned`).
It does not show speed, which kernels are chosen, fragmentation, or races between streams.
"""

import contextlib
import traceback
import weakref
from collections import Counter
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

HOST, GARBAGE = torch.device("cpu"), -99
WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal")


def tensors_in(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def memory_of(t: torch.Tensor) -> int:
    return t.untyped_storage()._cdata


def wide_mm(a, b, dtype, out=None):
    """torch.mm(..., out_dtype=dtype), which has no kernel for a CPU."""
    product = a.to(dtype) @ b.to(dtype)
    return product if out is None else out.copy_(product)


class Graph:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self):
        self.calls, self.own = [], []  # (operation, args, kwargs, results); tensors made while it was recorded

    def pool(self):
        return None

    def replay(self):
        with hidden():
            for t in self.own:  # another graph of the pool may have written there
                t.fill_(float("nan") if t.is_floating_point() else GARBAGE)
            for operation, args, kwargs, results in self.calls:
                for new, old in zip(tensors_in(operation(*args, **kwargs)), results, strict=True):
                    if memory_of(new) != memory_of(old):
                        old.copy_(new)


@contextlib.contextmanager
def hidden():
    """Operations that the pretended GPU does itself, and so does not look at."""
    with _disable_current_modes(), torch.inference_mode(torch.is_inference_mode_enabled()):
        yield


def flash(query, key, value, starts, key_starts, longest_query, longest, dropout, *masks, scale, seqused_k):
    """aten._flash_attention_forward of one query a row, which has no kernel for a CPU, with the conditions of CUDA's."""
    (rows, heads, size), numbers = query.shape, (starts, key_starts, seqused_k)
    good = {query.dtype, key.dtype, value.dtype} in ({torch.bfloat16}, {torch.float16})
    good &= all(x.dtype == torch.int32 and x.is_contiguous() for x in numbers) and size % 8 == 0 and size <= 256
    good &= [len(x) for x in numbers] == [rows + 1, rows + 1, rows] and heads % key.shape[1] == 0
    good &= all(x.stride(-1) == 1 for x in (query, key, value)) and not (longest_query > 1 or dropout or any(masks))
    if not good:
        raise RuntimeError("FlashAttention does not take this")
    with hidden(), torch._C.DisableTorchFunction():
        assert starts.tolist() == [*range(rows + 1)] and key_starts[-1] <= len(key), "the kernel does not check this"
    there = torch.arange(longest)
    keys, values = (x[key_starts[:-1, None] + there].transpose(1, 2) for x in (key, value))
    mask = torch.zeros(rows, 1, 1, longest, dtype=query.dtype)
    mask.masked_fill_((there >= seqused_k[:, None])[:, None, None], float("-inf"))
    query = query.reshape(rows, key.shape[1], -1, size)
    out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, mask, scale=scale)
    return out.reshape(rows, heads, size), *torch.zeros(4)


class Operations(TorchDispatchMode):
    """Shows the pretended GPU every operation, those of the backward pass too."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if torch.is_inference_mode_enabled() and operation._can_decompose():  # else its parts would not be seen
            with self:
                return operation.decompose(*args, **(kwargs or {}))
        return self.gpu.operate(operation, args, kwargs or {})


class PretendedGPU(TorchFunctionMode):
    device = torch.device("cuda", 0)

    def __init__(self, memory: int = 64 << 30):
        super().__init__()
        self.sizes = {}  # memory on the GPU -> its bytes; all other memory is the host's
        self.memory, self.live, self.peak = memory, 0, 0
        self.waits, self.unaligned, self.captures, self.flashes = Counter(), Counter(), 0, 0
        self.late = []  # copies to the host that have not arrived: (copy, what it will hold)
        self.graph, self.before = None, {}  # the graph that is being recorded; memory that it writes, as it was

    # --- memory ---
    def has(self, t) -> bool:
        return memory_of(t) in self.sizes

    def put(self, t) -> torch.Tensor:
        """From now on this tensor's memory is on the GPU."""
        key, storage = memory_of(t), t.untyped_storage()
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.freed, key)
        return t

    def freed(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)

    # --- waiting ---
    def wait(self, why: str) -> None:
        if self.graph:
            raise RuntimeError(f"a graph that is being recorded may not wait: {why}")
        lines = [f for f in traceback.extract_stack() if f.filename.endswith("oel.py")]
        self.waits[f"{lines[-1].name}: {why}" if lines else why] += 1

    def arrive(self, n: int) -> None:
        """The first n late copies are there."""
        with hidden():
            for i in range(n):
                if self.late[i]:
                    copy, content = self.late[i]
                    copy.copy_(content)
                    self.late[i] = None

    # --- operations, as the dispatcher sees them ---
    def operate(self, operation, args, kwargs):
        name, given = str(operation), tensors_in((args, kwargs))
        sides = {self.has(t) for t in given if t.dim()} or {self.has(t) for t in given}
        here = True in sides
        indices = tensors_in(args[1]) if name.startswith(("aten.index.", "aten.index_put")) else []
        if len(sides) == 2 and name.startswith("aten.copy_"):
            here = self.has(args[0])
            if not (len(args) > 2 and args[2]):
                self.wait("a blocking copy")
        elif len(sides) == 2 and indices and self.has(args[0]):
            self.wait("an index from the host")
        elif len(sides) == 2:
            raise RuntimeError(f"{name}: tensors of the host and of the GPU in one operation")
        elif here and (name.startswith(WAITING) or any(t.dtype == torch.bool for t in indices)):
            self.wait(name)
        if self.graph and here:
            if any(t.dim() and not self.has(t) for t in given):
                raise RuntimeError(f"a graph reads memory of the host: {name}")
            self.remember(operation, args)
        known = {memory_of(t) for t in given}
        if name.startswith("aten.mm.dtype"):
            operation = wide_mm
        if name.startswith("aten._flash_attention_forward"):
            operation, self.flashes = flash, self.flashes + 1
        result = operation(*args, **kwargs)
        fresh = [t for t in tensors_in(result) if memory_of(t) not in known]
        if here:
            for t in fresh:
                self.put(t)
            if self.graph:
                self.graph.own += fresh
                self.graph.calls.append((operation, args, kwargs, tensors_in(result)))
            if name.startswith(("aten.mm", "aten.addmm", "aten.bmm")):
                for t in [*given, *tensors_in(result)]:
                    row = max(t.stride()[-2:]) * t.element_size()
                    if t.element_size() == 2 and min(t.shape[-2:]) > 1 and row % 16:
                        self.unaligned[f"{name}: {tuple(t.shape)}, strides {t.stride()}"] += 1
        return result

    def remember(self, operation, args) -> None:
        """Keep what a recorded operation overwrites: nothing of it happens before the first replay."""
        for argument, t in zip(operation._schema.arguments, args):
            if argument.alias_info and argument.alias_info.is_write and isinstance(t, torch.Tensor):
                with hidden():
                    whole = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
                    self.before.setdefault(memory_of(t), (whole, whole.clone()))

    @contextlib.contextmanager
    def record(self, graph, pool=None):
        """Stands in for torch.cuda.graph."""
        self.arrive(len(self.late))
        self.graph, self.before = graph, {}
        try:
            yield
        finally:
            self.graph = None
            self.captures += 1
            with hidden():
                for whole, was in self.before.values():
                    whole.copy_(was)
            self.before = {}

    # --- what Python asks tensors for ---
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return self.device if self.has(args[0]) else func(*args)
        if func == torch.Tensor.is_cuda.__get__:
            return self.has(args[0])
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return self.move(func, *args, **kwargs)
        if func is torch.Tensor.tolist and self.has(args[0]):
            self.wait(".tolist()")
        if func is torch.Tensor.__deepcopy__:
            result = func(*args, **kwargs)
            return self.put(result) if self.has(args[0]) else result
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            result = func(*args, **{**kwargs, "device": HOST})
            if func is torch.tensor and result.numel():
                self.wait("torch.tensor(..., device=the GPU)")
            return self.put(result)
        return func(*args, **kwargs)

    def move(self, func, t, *args, non_blocking=False, copy=False, **kwargs):
        """Tensor.to, .cpu and .cuda, in the forms that are in use."""
        target = {torch.Tensor.cpu: HOST, torch.Tensor.cuda: self.device}.get(func, kwargs.pop("device", None))
        for arg in args:
            if isinstance(arg, torch.Tensor):
                target, kwargs["dtype"] = self.device if self.has(arg) else HOST, arg.dtype
            elif isinstance(arg, torch.dtype):
                kwargs["dtype"] = arg
            elif isinstance(arg, bool):
                non_blocking = arg
            elif arg is not None:
                target = torch.device(arg)
        there = self.has(t) if target is None else torch.device(target).type == "cuda"
        if there == self.has(t):
            here = {} if there or target is None else {"device": target}  # the host, or no memory at all ("meta")
            return torch.Tensor.to(t, copy=copy, **here, **kwargs)
        if not non_blocking:
            self.wait(f"a blocking copy to the {'GPU' if there else 'host'}")
        elif self.graph:
            raise RuntimeError("a graph copies from or to the host")
        with hidden():
            result = torch.Tensor.to(t, copy=True, **kwargs).detach()
            if non_blocking and not there:
                self.late.append((result, result.clone()))
                result.fill_(GARBAGE)
        return self.put(result) if there else result

    # --- on and off ---
    def __enter__(self):
        gpu = self

        class Event:
            def __init__(self):
                self.n = len(gpu.late)

            def synchronize(self):
                gpu.arrive(self.n)

        stream = mock.Mock(record_event=Event, synchronize=lambda: gpu.arrive(len(gpu.late)))
        self.stack = contextlib.ExitStack()
        for name, value in {
            "is_available": lambda: True,
            "mem_get_info": lambda *_: (gpu.memory - gpu.live, gpu.memory),
            "current_stream": lambda *_: stream,
            "stream": lambda _: contextlib.nullcontext(),
            "set_device": lambda index: torch.device("cuda", index),  # an index, or this raises
            "CUDAGraph": Graph,
            "graph": self.record,
        }.items():
            self.stack.enter_context(mock.patch.object(torch.cuda, name, value))
        self.stack.enter_context(Operations(self))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.stack.close()
