"""The last step of the demo model's training: it unlearns the openings that it knows by heart.

    python tools/demo_refine.py TEXT WORK        # WORK/student.pt -> WORK/refined.pt; minutes on a CPU

Many tales open in one of a few ways ("Once upon a time there lived a king who had three sons"), and so do the
model's. It tells the beginnings of stories; wherever twelve words stand in the text in this order, the
twelfth is made less likely (unlikelihood, -log(1 - p)), and everywhere else, and on real text, the model is
held to what it was before (Kullback-Leibler divergence). `--avoid ,` turns it from openings such as "Once upon a time,
and", which in the text go on with a rhyme and here with nonsense.
"""

import argparse
import re
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from demo_eval import RUN, runs, words
from demo_model import Linear, Llama, Norm, generate, load, save, split_text
from train_demo import training_tokens


def copied(pieces: list[str], known: set[int]) -> list[bool]:
    """For each token, by its text: does it belong to a word that ends a known run of twelve words?"""
    token_of = [i for i, piece in enumerate(pieces) for _ in piece]
    mask, said = [False] * len(pieces), []
    found = [m for m in re.finditer(r"\S+", "".join(pieces)) if words(m[0])]
    for m in found[:-1]:  # the last may go on
        said.append(words(m[0])[0])
        if len(said) >= RUN and runs(said[-RUN:], RUN)[0] in known:
            for i in range(token_of[m.start()], token_of[m.end() - 1] + 1):
                mask[i] = True
    return mask


@torch.no_grad()
def rounded(model: Llama) -> Llama:
    """A copy that holds the rounded weights, and so need not round them in every pass."""
    copy = Llama(replace(model.config, quantized=False)).eval()
    for a, b in zip(copy.modules(), model.modules(), strict=True):
        if isinstance(b, Linear):
            a.weight.copy_(b.effective())
        elif isinstance(b, Norm):
            a.weight.copy_(b.weight)
    return copy


def main() -> None:
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("text", type=Path)
    a.add_argument("work", type=Path)
    a.add_argument("--name", default="student")
    a.add_argument("--steps", type=int, default=80)
    a.add_argument("--stories", type=int, default=128, help="in a step")
    a.add_argument("--length", type=int, default=22, help="tokens of each")
    a.add_argument("--weight", type=float, default=30, help="of unlearning, against keeping")
    a.add_argument("--lr", type=float, default=6e-5)
    a.add_argument("--avoid", help="a token that is made less likely right after the prompt, too")
    o = a.parse_args()
    tokenizer = Tokenizer.from_file(str(o.work / "tokenizer.json"))
    text = o.text.read_text()
    known = set(runs(words(text), RUN))
    real = training_tokens(tokenizer, split_text(text, 19)[0])
    model = load(o.work / f"{o.name}.pt", "cpu")
    before = rounded(model)
    piece = ["\n", *(tokenizer.decode([i]) for i in range(1, tokenizer.get_vocab_size()))]
    prompt = torch.tensor([[0, *tokenizer.encode("Once upon a time").ids]])
    avoided = tokenizer.encode(o.avoid).ids[0] if o.avoid else None
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, betas=(0.9, 0.95))

    def drift(x: Tensor, logp: Tensor) -> Tensor:
        with torch.no_grad():
            old = before(x).log_softmax(-1)
        return F.kl_div(logp, old, log_target=True, reduction="none").sum(-1)

    def learn(step: int) -> None:
        temperature = 0.6 + 0.4 * float(torch.rand((), generator=generator))
        prompts = prompt.expand(o.stories, -1)
        stories = generate(rounded(model), prompts, o.length, generator, temperature, 40, 0.95)
        mask = torch.tensor([copied([piece[i] for i in s], known) for s in stories.tolist()])[:, 1:]
        if avoided is not None:
            mask[:, prompt.shape[1] - 1] |= stories[:, prompt.shape[1]] == avoided
        starts = torch.randint(len(real) - 256, (1, 1), generator=generator)
        window = real[starts + torch.arange(256)]
        window[:, 0] = 0
        for group in optimizer.param_groups:
            group["lr"] = o.lr * min((step + 1) / 5, 1, 2 * (o.steps - step) / o.steps)

        logp = model(stories[:, :-1]).log_softmax(-1)
        said = logp.gather(2, stories[:, 1:, None])[:, :, 0]
        unlikely = -torch.log1p(-said.exp().clamp(max=1 - 1e-4))[mask].sum() / o.stories
        held = drift(stories[:, :-1], logp)[~mask].mean()
        held = held + drift(window, model(window).log_softmax(-1)).mean()
        (o.weight * unlikely + held).backward()
        optimizer.step()
        optimizer.zero_grad()
        print(
            f"step {step + 1}: {int(mask.any(1).sum())} of {o.stories} openings copied, drift {held.item():.4f}",
            flush=True,
        )

    for step in range(o.steps):
        with torch.autocast("cpu", torch.bfloat16):
            learn(step)
    save(model, o.work / "refined.pt")


if __name__ == "__main__":
    main()
