"""Train a small GPT-2 on source code, make it reversible, and fine-tune it on the Bible, with and without LoRA.

    pip install 'revnets[hf]'
    python examples/pretrained/gpt2.py                                         # about 3 CPU minutes, one thread
    python examples/pretrained/gpt2.py --seeds 1 --pretraining 50 --updates 5  # a quick look

The training text is the source of Python's standard library, as bytes, which every Python installation contains. The
same network is then fine-tuned on English verses, each time from the same weights and with the same batches: the
original, converted with several update rules and blends, with a blend that grows from 0, and with low-rank adapters
(PEFT).
"""

from __future__ import annotations

import copy
import math
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from _measures import (
    all_equal,
    gradients,
    memory_table,
    new_console,
    new_table,
    picture,
    read_verses,
    run_as_script,
    spread,
    step_bytes,
    steps,
)
from matplotlib.figure import Figure
from torch import Tensor, nn

import revnets
from revnets.plotting.style import save

CONTEXT = 128
EVERY = 8
"""Updates between evaluations on held-out text."""


class Way(NamedTuple):
    """How to fine-tune the pretrained network."""

    blend: float | None = None  # None: the original network
    rule: str = "blend"
    grows: bool = False  # whether the blend grows from 0 over the first half of the updates
    adapters: bool = False  # whether to train low-rank adapters instead of all weights


WAYS: Mapping[str, Way] = {
    "original": Way(),
    "b = 0.1": Way(0.1),
    "b = 0.5": Way(0.5),
    "b from 0 to 0.5": Way(0.5, grows=True),
    "momentum 0.5": Way(0.5, "momentum"),
    "LoRA": Way(adapters=True),
    "LoRA, b = 0.1": Way(0.1, adapters=True),
}


class Curve(NamedTuple):
    """Bits per byte of held-out text during a fine-tuning."""

    updates: list[int]
    bits: list[float]


def standard_library() -> Tensor:
    """Read the source of the top-level modules of the standard library as bytes (int64)."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"\n".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()


def english_verses() -> Tensor:
    """Read the bundled verses as bytes (int64)."""
    text = "\n".join(verse.english for verse in read_verses())
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def batches(text: Tensor, size: int, count: int, seed: int) -> Iterator[Tensor]:
    """Yield random pieces of the text (size, CONTEXT)."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(0, len(text) - CONTEXT, (size,), generator=generator)
        yield torch.stack([text[start : start + CONTEXT] for start in starts.tolist()])


def new_gpt2(layers: int, width: int) -> nn.Module:
    """Build a byte-level GPT-2 of transformers, without dropout.

    Raises:
        ImportError: If transformers is missing.
    """
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise ImportError(f"{error}. Install revnets[hf]") from error
    config = GPT2Config(
        vocab_size=256,
        n_positions=CONTEXT,
        n_embd=width,
        n_layer=layers,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,  # a replay would fill a cache twice
    )
    return GPT2LMHeadModel(config)


def bits_per_byte(model: nn.Module, text: Tensor) -> Tensor:
    """Compute bits per byte of text (pieces, CONTEXT), without the first byte of each piece."""
    return model(input_ids=text, labels=text).loss / math.log(2)


@torch.no_grad()
def held_out_bits(model: nn.Module, text: Tensor) -> float:
    """Compute bits per byte in evaluation mode."""
    model.eval()
    bits = float(bits_per_byte(model, text))
    model.train()
    return bits


def train(
    model: nn.Module,
    pieces: Iterator[Tensor],
    updates: int,
    rate: float,
    description: str,
    after: Callable[[int], None] = lambda update: None,
) -> None:
    """Train with AdamW, a linear warm-up over a tenth of the updates, and a linear decay to a tenth of the rate."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=rate)
    warmup = max(1, updates // 10)
    factor = lambda step: min((step + 1) / warmup, 1 - 0.9 * step / updates)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    for update in steps(range(1, updates + 1), description):
        optimizer.zero_grad()
        bits_per_byte(model, next(pieces)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        after(update)


def converted(trained: nn.Module, way: Way) -> nn.Module:
    """Return a copy of the pretrained network, with adapters and a blend if `way` has them."""
    model: Any = copy.deepcopy(trained)
    if way.adapters:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True))
    return model if way.blend is None else revnets.make_reversible(model, way.blend, rule=way.rule)


def fine_tune(
    trained: nn.Module, way: Way, text: Tensor, held_out: Tensor, updates: int, seed: int, description: str
) -> Curve:
    """Fine-tune a copy with batches drawn from the seed."""
    model = converted(trained, way)
    schedule = revnets.BlendSchedule(model, max(1, updates // 2)) if way.grows else None
    curve = Curve([0], [held_out_bits(model, held_out)])

    def after(update: int) -> None:
        if schedule is not None:
            schedule.step()
        if update % EVERY == 0 or update == updates:
            curve.updates.append(update)
            curve.bits.append(held_out_bits(model, held_out))

    rate = 5e-3 if way.adapters else 1e-3
    train(model, batches(text, 8, updates, seed), updates, rate, f"{description}, seed {seed}", after)
    return curve


def main(
    pretraining: Annotated[int, typer.Option(min=1, help="Updates on source code, with 8 pieces each.")] = 320,
    updates: Annotated[
        int, typer.Option(min=1, help="Updates of each fine-tuning on verses, with 8 pieces each.")
    ] = 16,
    seeds: Annotated[int, typer.Option(min=1, help="Number of fine-tunings of each kind.")] = 3,
    layers: Annotated[int, typer.Option(min=2, help="Number of layers.")] = 12,
    width: Annotated[int, typer.Option(min=4, help="Number of channels, a multiple of 4.")] = 64,
    png: Annotated[
        Path | None, typer.Option(help="Write a figure of the curves to this file.", callback=picture)
    ] = None,
) -> None:
    """Train a small GPT-2, make it reversible in several ways, and fine-tune each."""
    console = new_console()
    if width % 4:
        raise typer.BadParameter(f"{width}: use a multiple of 4", param_hint="--width")
    source, verses = standard_library(), english_verses()
    text, rest = verses[: len(verses) * 9 // 10], verses[len(verses) * 9 // 10 :]
    held_out = next(batches(rest, 24, 1, seed=0))
    code = next(batches(source[-len(source) // 20 :], 24, 1, seed=0))
    trained = new_gpt2(layers, width)
    train(trained, batches(source[: -len(source) // 20], 8, pretraining, 0), pretraining, 4e-3, "pretraining")
    console.print(
        f"trained on {len(source):,} bytes: {held_out_bits(trained, code):.3f} bits per byte of held-out code"
    )
    console.print(fidelity_table(trained, code))
    console.print(memory_of(trained, held_out[:8]))

    curves: dict[str, list[Curve]] = {}
    title = f"bits per byte of verses, {updates} updates, {seeds} seeds"
    table = new_table(title, "", "before", "after")
    for name, way in WAYS.items():
        curves[name] = [fine_tune(trained, way, text, held_out, updates, seed, name) for seed in range(seeds)]
        after = spread([curve.bits[-1] for curve in curves[name]], 3)
        console.print(f"{name}: {after} bits per byte")
        table.add_row(name, f"{curves[name][0].bits[0]:.3f}", after)
    console.print(table)
    if png is not None:
        save(figure(curves), png)
        console.print(f"figure {png}")


def fidelity_table(trained: nn.Module, text: Tensor) -> Any:
    """Return bits per byte and predictions of the converted network on its training domain, before fine-tuning."""
    table = new_table("held-out code, no training", "rule", "b", "bits per byte", "equal predictions")
    with torch.no_grad():
        before = trained.eval()(input_ids=text).logits.argmax(-1)
    for rule in ("blend", "momentum"):
        for blend in (0.05, 0.1, 0.2, 0.5):
            model = converted(trained, Way(blend, rule)).eval()
            with torch.no_grad():
                equal = (model(input_ids=text).logits.argmax(-1) == before).float().mean()
            bits = held_out_bits(model, text)
            table.add_row(rule, f"{blend:g}", f"{bits:.3f}", f"{100 * float(equal):.1f} %")
    return table


def memory_of(trained: nn.Module, text: Tensor) -> Any:
    """Return the memory of a training step, with all weights and with adapters."""
    rows, equal = [], True
    for adapters in (False, True):
        prefix = "LoRA, " if adapters else ""
        model = converted(trained, Way(adapters=adapters)).train()
        rows.append((f"{prefix}original", step_bytes(model, lambda model=model: bits_per_byte(model, text))))
        model = converted(trained, Way(0.1, adapters=adapters)).train()
        loss = lambda model=model: bits_per_byte(model, text)  # noqa: E731
        found = []
        for mode in ("store", "exact"):
            revnets.find_columns(model).memory = mode
            rows.append((f"{prefix}b = 0.1, {mode}", step_bytes(model, loss)))
            found.append(gradients(model, loss))
        equal = equal and all_equal(*found)
    words = "equal" if equal else "DIFFERENT"
    return memory_table(f"a step of {text.numel()} bytes; gradients of exact and store: {words}", rows)


def figure(curves: Mapping[str, list[Curve]]) -> Figure:
    """Plot the mean curve over seeds of each method."""
    found = Figure(figsize=(8, 4.5), layout="constrained", facecolor="white")
    axes = found.subplots()
    for place, (name, of_way) in enumerate(curves.items()):
        means = [sum(values) / len(values) for values in zip(*(curve.bits for curve in of_way), strict=True)]
        axes.plot(of_way[0].updates, means, "--" if WAYS[name].adapters else "-", color=f"C{place}", label=name)
    axes.set(xlabel="updates", ylabel="bits per byte of held-out verses")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return found


if __name__ == "__main__":
    run_as_script(main)
