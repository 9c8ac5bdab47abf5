"""EleutherAI's lm-evaluation-harness on masked diffusion models: `--model remask`.

The harness looks models up in a table of its own and finds no plug-ins, so its command line has to start here:

    remask-lm-eval --model remask --model_args pretrained=tiny,estimator=elbo --tasks ...        # one process
    accelerate launch -m remask.evaluation.lm_eval --model remask --model_args ... --tasks ...   # one process a device

Everything after the command is the harness' own. From Python, importing this module registers the model for `simple_evaluate`,
and `RemaskLM(lm)` takes a model that is loaded already, edits attached.

Randomness is keyed by what is scored, so results depend neither on the number of processes nor on batches: all continuations of
one context share their masks, different contexts do not.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch

from ..backbones import Encoded, MaskedDiffusionLM, load
from ..backbones.model import length_batches
from ..diffusion.canvas import TOKEN_BUDGET
from ..diffusion.likelihood import Likelihood, bernoulli, chain, elbo, pll
from ..diffusion.masks import MAX_ANSWER, MaskBank
from ..diffusion.sampler import SamplerConfig, generate
from ..errors import RemaskError
from ..random import digest

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise RemaskError(f"the evaluation harness is not installed ({error}); pip install 'remask[bench]'") from None

ESTIMATORS = ("elbo", "bernoulli", "chain", "pll")
CHUNK = 32  # rows between two ticks of the progress bar
_Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, context ids, continuation ids
_log = logging.getLogger(__name__)


@register_model("remask")
class RemaskLM(TemplateLM):
    """A masked diffusion model as the harness sees models; constructor arguments are the harness' `--model_args`.

    A context is put into the model's template (`chat`: into the chat template, as one user turn). Without a separator at the
    template's end, context and continuation are tokenised jointly and trailing spaces move to the continuation, as upstream
    does; with one, the two are tokenised apart and the white space between them is dropped. Contexts that are too long lose
    tokens on the left.

    Args:
        pretrained: bundled name, folder or hub id, or a loaded model; `family`, `chat` and `dtype` are those of `load`.
        device: the harness' `--device`. Without CUDA it is the CPU, under data parallelism each process's own.
        estimator: of log-likelihoods: elbo, bernoulli, chain (forward) or pll.
        draws: masks a replicate (elbo, bernoulli); with `replicates` and `seed` the mask bank. 32 x 4 are the usual 128.
        cfg_scale: classifier-free guidance, in likelihoods and generation.
        greedy: whether `is_greedy` of a likelihood is worked out: the greedy sampler, one token a step on a canvas of exactly
            the continuation's length, gives the continuation. One forward a token; False is reported otherwise.
        gen_length: response slots, `steps` and `block_length` as in `SamplerConfig`; the model's own by default. A task's
            `max_gen_toks` shortens the response after the fact, since slots are part of what the model conditions on.
        token_budget: tokens a forward.
        batch_size: passed by the harness, like `max_batch_size`; not used, batches hold `token_budget` tokens.

    Raises:
        RemaskError: unknown estimator or dtype, or whatever `load`, `MaskBank` and `SamplerConfig` refuse.
    """

    def __init__(
        self,
        pretrained: str | MaskedDiffusionLM,
        *,
        family: str | None = None,
        chat: bool = False,
        dtype: str = "float32",
        device: str = "cuda",
        estimator: str = "elbo",
        draws: int = 32,
        replicates: int = 4,
        seed: int = 0,
        cfg_scale: float = 0.0,
        greedy: bool = False,
        gen_length: int | None = None,
        steps: int | None = None,
        block_length: int | None = None,
        token_budget: int = TOKEN_BUDGET,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if estimator not in ESTIMATORS:
            raise RemaskError(f"estimator {estimator!r} is unknown; choose one of {', '.join(ESTIMATORS)}")
        if not isinstance(getattr(torch, str(dtype), None), torch.dtype):
            raise RemaskError(f"dtype {dtype!r} is unknown; use float32, bfloat16 or float16")
        place = self._join(device if torch.cuda.is_available() else "cpu")
        if isinstance(pretrained, MaskedDiffusionLM):
            self.lm = pretrained
        else:
            self.lm = load(str(pretrained), family=family, chat=chat, dtype=getattr(torch, dtype), device=place)
        if self.lm.tokenizer is None:
            raise RemaskError(f"{self.lm.name} was loaded without a tokenizer; the harness' tasks are text")
        self._device = self.lm.device
        self.tokenizer = self.lm.tokenizer
        self.max_length = self.lm.spec.max_length
        self.estimator, self.cfg_scale, self.greedy, self.token_budget = estimator, cfg_scale, greedy, token_budget
        self.bank = MaskBank(draws, replicates, seed)
        given = {"gen_length": gen_length, "steps": steps, "block_length": block_length}
        self.sampler = self._sampler(**{name: value for name, value in given.items() if value is not None})
        if self.sampler.gen_length >= self.max_length:
            slots = self.sampler.gen_length
            raise RemaskError(
                f"gen_length {slots} leaves {self.lm.name} no room for a prompt: its context is {self.max_length}"
            )

    # ---------------------------------------------------------------- what the harness asks for
    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return self.lm.spec.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, or the end token where there is none."""
        bos = self.tokenizer.bos_token_id
        return int(bos) if bos is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """Names the harness' cache of chat requests."""
        return self.lm.name

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The family's Jinja template, which the harness records."""
        return self.lm.spec.chat_template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, for the harness' `--apply_chat_template`.

        Raises:
            RemaskError: the family has no chat template, or contexts are put into a template already (`chat=True`).
        """
        spec = self.lm.spec
        if not spec.chat_template:
            raise RemaskError(f"{self.lm.name} has no chat template; run without --apply_chat_template")
        if spec.template != "{prompt}":
            raise RemaskError("chat=True and --apply_chat_template would apply the chat template twice; give one of them")
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                chat_template=spec.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: Any) -> list[int]:
        """Token ids of a text; special tokens are those written in it.

        Raises:
            RemaskError: the text contains the mask token.
        """
        ids = list(self.tokenizer(string, add_special_tokens=False)["input_ids"])
        if self.lm.spec.mask_id in ids:
            raise RemaskError(f"a request contains the mask token of {self.lm.name}: {string[:80]!r}")
        return ids

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of each document, in disjoint windows of at most the context (or 2048 tokens)."""
        windows = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, min(self.max_length - 1, MAX_ANSWER), 1
                )
            ]
            for request in requests
        ]
        flat: list[_Request] = [(None, context, continuation) for document in windows for context, continuation in document]
        scores = iter(self._loglikelihood_tokens(flat, disable_tqdm=disable_tqdm))
        results = []
        for request, document in zip(requests, windows, strict=True):
            results.append(sum((next(scores)[0] for _ in document), 0.0))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy responses, cut at the first stop string.

        Raises:
            RemaskError: the task asks for random sampling.
        """
        room = self.max_length - self.sampler.gen_length
        prompts = [tuple(self.tok_encode(self.lm.spec.template.replace("{prompt}", request.args[0]))) for request in requests]
        self._warn_truncated(sum(len(prompt) > room for prompt in prompts))
        prompts = [prompt[-room:] or (self.prefix_token_id,) for prompt in prompts]
        for request in requests:
            options = request.args[1]
            if options.get("do_sample", (options.get("temperature") or 0) > 0):
                raise RemaskError("generation is greedy, but the task asks for sampling; pass --gen_kwargs do_sample=False")
        results = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="generate_until") as bar:
            for batch in length_batches([len(prompt) + self.sampler.gen_length for prompt in prompts], self.token_budget):
                chosen = [prompts[i] for i in batch]
                done = generate(self.lm, chosen, self.sampler, keys=[digest(*prompt) for prompt in chosen])
                for i, generation in zip(batch, done, strict=True):
                    results[i] = self._response(generation.response, requests[i].args[1])
                    self.cache_hook.add_partial("generate_until", requests[i].args, results[i])
                bar.update(len(batch))
        return results

    def get_model_info(self) -> dict[str, Any]:
        """What a reader of the results needs to repeat them; the harness stores it under `config`."""
        drawn = self.estimator in ("elbo", "bernoulli")
        return {
            "model_name": self.lm.name,
            "model_family": self.lm.spec.family,
            "model_fingerprint": self.lm.fingerprint(),
            "model_num_parameters": self.lm.num_parameters,
            "model_dtype": str(self.lm.model.dtype).removeprefix("torch."),
            "edits_attached": len(self.lm.attached),
            "template": self.lm.spec.template,
            "likelihood": {
                "estimator": self.estimator,
                "order": "forward" if self.estimator == "chain" else None,
                "mask_bank": {**asdict(self.bank), "fingerprint": self.bank.fingerprint([("", 64)])} if drawn else None,
                "cfg_scale": self.cfg_scale,
                "is_greedy": "greedy sampler" if self.greedy else "not computed, reported as False",
            },
            "generation": asdict(self.sampler),
        }

    # ---------------------------------------------------------------- scoring
    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        head, tail = self.lm.spec.template.split("{prompt}")
        if not tail:
            return super()._encode_pair(head + context, continuation)
        return self.tok_encode(head + context.rstrip() + tail), self.tok_encode(continuation.lstrip())

    def _loglikelihood_tokens(
        self, requests: list[_Request], disable_tqdm: bool = False, **_options: Any
    ) -> list[tuple[float, bool]]:
        rows = [self._row(*request) for request in requests]
        self._warn_truncated(sum(len(row.prompt_ids) < len(request[1]) for row, request in zip(rows, requests, strict=True)))
        if not self.greedy:
            _log.warning("is_greedy is reported as False; pass greedy=True to tasks that score it (LAMBADA's accuracy)")
        results: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        with tqdm(total=len(rows), disable=disable_tqdm or self.rank != 0, desc=f"loglikelihood ({self.estimator})") as bar:
            for chosen in _chunks(order):
                scores = self._estimate([rows[i] for i in chosen])
                matches = self._greedy([rows[i] for i in chosen]) if self.greedy else [False] * len(chosen)
                for i, score, match in zip(chosen, scores, matches, strict=True):
                    results[i] = (score.logprob, match)
                    if requests[i][0] is not None:  # None: a window of a document, which is cached as a whole
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
                bar.update(len(chosen))
        return results

    def _row(self, text: tuple[str, str] | None, context: Sequence[int], continuation: Sequence[int]) -> Encoded:
        """One request as a row whose id keys its masks: the context, or the whole text where there is but a prefix token."""
        room = self.max_length - len(continuation)
        if not continuation:
            raise RemaskError(f"a request has a continuation without tokens: {text!r}"[:200])
        if room < 1:
            raise RemaskError(
                f"a continuation of {len(continuation)} tokens does not fit the context of {self.lm.name} ({self.max_length})"
            )
        key = digest(*context) if len(context) > 1 else digest(*context, *continuation)
        return Encoded(key, tuple(context[-room:]), tuple(continuation), (0, 1))

    def _estimate(self, rows: list[Encoded]) -> list[Likelihood]:
        if self.estimator == "elbo":
            return elbo(self.lm, rows, self.bank, cfg_scale=self.cfg_scale, token_budget=self.token_budget)
        if self.estimator == "bernoulli":
            return bernoulli(self.lm, rows, self.bank, cfg_scale=self.cfg_scale, token_budget=self.token_budget)
        exact = chain if self.estimator == "chain" else pll
        return exact(self.lm, rows, cfg_scale=self.cfg_scale, token_budget=self.token_budget)

    def _greedy(self, rows: list[Encoded]) -> list[bool]:
        matches = [False] * len(rows)
        for length in {len(row.answer_ids) for row in rows}:
            chosen = [i for i, row in enumerate(rows) if len(row.answer_ids) == length]
            prompts = [rows[i].prompt_ids for i in chosen]
            config = self._sampler(gen_length=length)
            done = generate(self.lm, prompts, config, keys=[rows[i].id for i in chosen])
            for i, generation in zip(chosen, done, strict=True):
                matches[i] = tuple(generation.response) == rows[i].answer_ids
        return matches

    def _sampler(self, **changes: int) -> SamplerConfig:
        guidance = {"cfg_scale": self.cfg_scale} if self.cfg_scale else {}  # not every family's sampler takes it
        return SamplerConfig.default(self.lm, **guidance, **changes)

    def _response(self, ids: Sequence[int], options: dict[str, Any]) -> str:
        """Text of response ids up to the end token, `max_gen_toks` and the first stop string, special tokens removed.

        Stop strings are looked for while special tokens are still visible, since they can be one (an end-of-turn mark).
        """
        ids = list(ids)[: options.get("max_gen_toks")]
        if self.eot_token_id in ids:
            ids = ids[: ids.index(self.eot_token_id)]
        text = str(self.tokenizer.decode(ids, skip_special_tokens=False))
        until = options.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            text = text.split(stop)[0] if stop else text
        plain = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return str(self.tokenizer.decode(plain, skip_special_tokens=True))

    def _warn_truncated(self, count: int) -> None:
        if count:
            _log.warning("%d contexts are longer than %s takes and lose tokens on the left", count, self.lm.name)

    # ---------------------------------------------------------------- data parallelism
    def _join(self, device: str) -> str | torch.device:
        """Join the other processes where a launcher started several; the device to load the model on."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return device
        try:
            from accelerate import PartialState
        except ImportError:
            raise RemaskError("several processes need accelerate; pip install 'remask[bench]'") from None
        state = PartialState(cpu=device == "cpu", timeout=timedelta(weeks=1))  # ranks wait for the slowest at the end
        self._rank, self._world_size = state.process_index, state.num_processes
        return state.device

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Tensors of all processes, concatenated."""
        if self.world_size == 1:
            return tensor
        from accelerate.utils import gather

        return gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Objects of all processes on process `dst`, None on the others."""
        if self.world_size == 1:
            return [obj]
        result = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, result, dst=dst)
        return result

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            torch.distributed.barrier()


def _chunks(order: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(order), CHUNK):
        yield order[start : start + CHUNK]


def main() -> None:
    """The harness' command line with `--model remask` known to it; bad input is one sentence on stderr and exit code 2."""
    try:
        cli_evaluate()
    except RemaskError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
