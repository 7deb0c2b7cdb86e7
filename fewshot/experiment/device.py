"""Device, precision, seeds and the processes of torchrun."""

from __future__ import annotations

from fewshot.experiment.errors import UserError
from fewshot.experiment.threads import keep_freed_memory, share_cores

import atexit
import contextlib
import os
import platform
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist


def setup(args) -> torch.device:
    """Seed every generator, choose the device and, under torchrun, join the other processes."""
    random.seed(args.random_seed)
    np.random.seed(args.random_seed % 2**32)
    torch.manual_seed(args.random_seed)
    torch.backends.cudnn.deterministic = True
    keep_freed_memory()
    # Numbers below 1e-38 count as zero: where gates are saturated, gradients are full of them, and each costs a hundred
    # cycles (a step of the MANN on large pictures took twelve times as long). Threads inherit it from this one.
    torch.set_flush_denormal(True)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; use --device cpu or auto")
    if args.device == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("--device mps: torch finds no Apple GPU here; use --device cpu or auto")
        return torch.device("mps")
    gpu = args.device != "cpu" and torch.cuda.is_available()
    if started_by_torchrun() and not dist.is_initialized():
        one_each = gpu and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()
        try:
            dist.init_process_group("nccl" if one_each else "gloo")  # NCCL refuses processes that share a GPU
        except (RuntimeError, ValueError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
            raise UserError(f"cannot join the other processes ({reason}); {UNSET_RANK}") from error
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    if not gpu:
        share_cores()
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


UNSET_RANK = "start by torchrun, or unset RANK and WORLD_SIZE to train in one process"


def started_by_torchrun() -> bool:
    """Whether the environment names this process and the others; single variables are left over and mean nothing."""
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if not rank or not size:
        return False
    if not rank.isdecimal() or not size.isdecimal() or int(rank) >= int(size):
        raise UserError(f"RANK={rank} and WORLD_SIZE={size} in the environment are no processes; {UNSET_RANK}")
    lacks = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if lacks and int(size) > 1:
        raise UserError(f"the environment has WORLD_SIZE={size} but no {' and '.join(lacks)}; {UNSET_RANK}")
    return not lacks


def shard() -> tuple[int, int]:
    """(rank, number of processes) of this process; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average_gradients(model: torch.nn.Module) -> None:
    """Replace each gradient by its mean over all processes: one all-reduce of one flat vector."""
    if shard()[1] == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= shard()[1]
    for g, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        g.copy_(mean.view_as(g))


def precision(args, device: torch.device, probe=None) -> torch.dtype:
    """What --dtype means here: auto is bfloat16 where the processor computes in it and `probe` works, else float32.

    probe: computes a piece of the network under bfloat16 and raises RuntimeError where a kernel is missing; then even
    --dtype bfloat16 becomes float32, with a note.
    """
    if args.dtype == "float32" or (args.dtype == "auto" and not fast_in_bfloat16(device)):
        return torch.float32
    try:
        if probe is not None:
            with torch.random.fork_rng(devices=[]), torch.autocast(device.type, torch.bfloat16):
                probe()  # its random numbers are not missing afterwards
    except RuntimeError:
        if args.dtype == "bfloat16":
            print("note: this processor cannot compute the network in bfloat16; going on in float32", file=sys.stderr)
        return torch.float32
    return torch.bfloat16


def fast_in_bfloat16(device: torch.device) -> bool:
    """Whether the processor has instructions for bfloat16; elsewhere it is emulated, and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    # The capability is what torch may use: ATEN_CPU_CAPABILITY=avx2 makes it that of an older processor.
    allowed = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return allowed and any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def autocast(device: torch.device, dtype: torch.dtype):
    """The context of a forward pass: bfloat16 where `dtype` is, else nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def processor() -> str:
    """Name of the processor and the widest instructions that torch uses on it."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    kind = torch.backends.cpu.get_cpu_capability() + (" with bfloat16" if fast_in_bfloat16(torch.device("cpu")) else "")
    return f"{name}, {kind}"


def peak_megabytes(device: torch.device) -> float:
    """Most memory so far: of torch on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def device_name(device: torch.device) -> str:
    """For reports: the GPU's name, or the CPU threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"
