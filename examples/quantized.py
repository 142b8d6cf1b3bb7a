"""Text by a quantized model of the llama family, with the arguments of Candle's example of the same name.

    python examples/quantized.py --which 7b-mistral-instruct --prompt "The best thing about coding in Python is "
    python examples/quantized.py --model model.gguf --prompt interactive

Models that are not on this machine are downloaded (pip install 'hipquant[hub]'). The tokenizer is that of the GGUF
file, and so is what a conversation looks like.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator

import hipquant
from hipquant.aliases import QUANTIZED
from hipquant.chat import ChatTemplate
from hipquant.generate import Generation
from hipquant.hub import find


def arguments(which: Iterable[str], default: str, prompt: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__.split("\n")[0])
    parser.add_argument("--model", help="a GGUF file, a folder, or a repository of the hub")
    parser.add_argument("--which", choices=list(which), default=default, help="a model by its short name (%(default)s)")
    parser.add_argument("--prompt", default=prompt, help="or `interactive`: several, or `chat`: a conversation")
    parser.add_argument("-n", "--sample-len", type=int, default=1000, help="most tokens to generate (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the best token (%(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="choose among the best that sum to p")
    parser.add_argument("--top-k", type=int, default=0, help="choose among the k best")
    parser.add_argument("--seed", type=int, default=299792458)
    parser.add_argument("--repeat-penalty", type=float, default=1.1, help="1: none (%(default)s)")
    parser.add_argument("--repeat-last-n", type=int, default=64, help="tokens that the penalty looks at (%(default)s)")
    parser.add_argument("--verbose-prompt", action="store_true", help="show the tokens of the prompt")
    parser.add_argument("--split-prompt", action="store_true", help="process the tokens of the prompt one by one")
    parser.add_argument("--cpu", action="store_true", help="the same as --device cpu")
    parser.add_argument("--device", default="auto", help="as `hipquant devices` names them")
    return parser


def prompts(args: argparse.Namespace, model: hipquant.Model, messages: list[dict[str, str]]) -> Iterator[list[int]]:
    """The tokens of each prompt; a conversation is kept in `messages`."""
    if args.prompt not in ("interactive", "chat"):
        print(args.prompt, end="", flush=True)
        yield model.tokenizer.encode(args.prompt)
        return
    template = ChatTemplate.of(model.tokenizer)
    for line in iter(ask, None):
        if args.prompt == "interactive":
            messages.clear()
        messages.append({"role": "user", "content": line})
        yield model.tokenizer.encode(template.render(messages), parse_special=True)


def ask() -> str | None:
    try:
        return input("> ")
    except EOFError:
        return None


def generate(args: argparse.Namespace, model: hipquant.Model, tokens: list[int]) -> Generation:
    if args.verbose_prompt:
        for token in tokens:
            print(f"{token:7} -> {model.tokenizer.token_bytes(token).decode('utf-8', 'replace')!r}")
    if args.split_prompt:  # what the cache holds then is not computed again
        for position, token in enumerate(tokens):
            model.forward([token], position)
    return model.generate(
        tokens,
        max_tokens=args.sample_len,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=0.0,
        repetition_penalty=args.repeat_penalty,
        repetition_window=args.repeat_last_n,
        seed=args.seed,
        stop=("\nUser:",) if args.prompt == "chat" and model.tokenizer.chat_template is None else (),
    )


def run(args: argparse.Namespace) -> None:
    device = hipquant.device("cpu" if args.cpu else args.device)
    model = hipquant.load(find(args.model or args.which, free=device.free_memory, say=print), device)
    print(f"{model.name}: {len(model.file.tensors)} tensors, {model.weights_bytes / 1e9:.2f} GB of weights on {device}")
    print(f"temp: {args.temperature:.2f} repeat-penalty: {args.repeat_penalty:.2f} repeat-last-n: {args.repeat_last_n}")
    messages: list[dict[str, str]] = []
    for tokens in prompts(args, model, messages):
        generation, text = generate(args, model, tokens), ""
        for piece in generation:
            print(piece, end="", flush=True)
            text += piece
        messages.append({"role": "assistant", "content": text.strip()})
        times = generation.timings
        print(f"\n\n{times.prompt_tokens:4} prompt tokens processed: {times.prompt_tokens_per_second:.2f} token/s")
        print(f"{times.generated_tokens:4} tokens generated: {times.generated_tokens_per_second:.2f} token/s")


def main(parser: argparse.ArgumentParser) -> None:
    try:
        run(parser.parse_args())
    except (hipquant.HipquantError, ValueError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main(arguments(QUANTIZED, "7b", "My favorite theorem is "))
