"""The lm-evaluation-harness adapter: real harness runs on local tasks, and its numbers against estimators and slow loops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

pytest.importorskip("lm_eval", reason="needs the evaluation harness: pip install 'remask[bench]'")

import lm_eval
from lm_eval.tasks import TaskManager

from conftest import FACTS
from remask.backbones import MaskedDiffusionLM
from remask.diffusion.likelihood import bernoulli, chain, elbo, pll
from remask.errors import RemaskError
from remask.evaluation.lm_eval import RemaskLM
from remask.facts import Fact

CHOICES = sorted({fact.answer for fact in FACTS})


def request(*args: object) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def slow_greedy(lm: MaskedDiffusionLM, question: str, answer: str) -> bool:
    """Whether the most confident token first, one at a time on as many masks as the answer has tokens, spells the answer."""
    fact = lm.encode(Fact("x", question, question, answer))
    ids, start = list(fact.prompt_ids) + [lm.spec.mask_id] * len(fact.answer_ids), len(fact.prompt_ids)
    open_places = set(range(start, len(ids)))
    while open_places:
        with torch.inference_mode():
            top = lm.model(input_ids=torch.tensor([ids])).logits[0].softmax(-1).max(-1)
        place = max(open_places, key=lambda i: float(top.values[i]))
        ids[place] = int(top.indices[place])
        open_places.remove(place)
    return tuple(ids[start:]) == fact.answer_ids


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multiple-choice task and a generation task over the same questions, as harness YAML."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": fact.prompt, "answer": fact.answer, "choices": CHOICES} for fact in FACTS[:5]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choice = {
        "task": "local_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{choices.index(answer)}}",
        "metric_list": [{"metric": "acc"}],
    }
    write = {
        "task": "local_write",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (choice, write):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    return folder


# ------------------------------------------------------------------ the harness itself
def test_harness_scores_what_a_taught_model_knows(taught, tasks) -> None:
    """Answers that were taught win among all answers and are generated, and the report says how that was found."""
    results = lm_eval.simple_evaluate(
        model=RemaskLM(taught, draws=8, replicates=2, seed=3, greedy=True),
        tasks=["local_choice", "local_write"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    found = set()
    assert results["results"]["local_choice"]["acc,none"] == 1.0
    assert results["results"]["local_write"]["exact_match,none"] == 1.0
    for sample in results["samples"]["local_choice"]:
        greedy = [response[0][1] for response in sample["resps"]]
        question = sample["doc"]["question"]
        assert greedy == [slow_greedy(taught, question, choice) for choice in CHOICES]
        found |= set(greedy)
    assert found == {False, True}
    config = results["config"]
    assert config["model_fingerprint"] == taught.fingerprint()
    assert config["likelihood"]["estimator"] == "elbo"
    assert {"draws": 8, "replicates": 2, "seed": 3}.items() <= config["likelihood"]["mask_bank"].items()
    assert config["generation"]["gen_length"] == taught.spec.gen_length


def test_the_harness_own_command_runs_the_example_tasks(tmp_path) -> None:
    """`lm_eval --model remask`: the examples bring the import that makes the name known."""
    root = Path(__file__).parents[1]
    words = ["--model", "remask", "--model_args", "pretrained=tiny,draws=4,replicates=1", "--device", "cpu", "--limit", "5"]
    words += ["--tasks", "examples/harness/closed_world_choice.yaml", "--output_path", str(tmp_path / "out.json")]
    done = subprocess.run([sys.executable, "-m", "lm_eval", *words], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    [written] = tmp_path.glob("out*.json")
    results = json.loads(written.read_text())
    assert results["results"]["closed_world_choice"]["acc,none"] == 1.0
    assert results["config"]["likelihood"]["mask_bank"]["draws"] == 4


def test_command_line_on_two_processes_gives_what_one_process_gives(tasks, tmp_path) -> None:
    """`--model remask` on the bundled model; splitting the rows over processes changes no sample."""
    names, arguments = ["local_choice", "local_write"], "pretrained=tiny,draws=4,replicates=1,gen_length=8"
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    alone = lm_eval.simple_evaluate(model="remask", model_args=arguments, tasks=names, task_manager=manager, device="cpu")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "remask.evaluation.lm_eval", "--model", "remask", "--model_args", arguments, "--tasks", ",".join(names)]
    command += ["--include_path", str(tasks), "--device", "cpu", "--log_samples", "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

    report = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert report["config"]["likelihood"] == alone["config"]["likelihood"]
    for name in names:
        assert report["n-samples"][name]["effective"] == 5
        lines = next((tmp_path / "out").rglob(f"samples_{name}_*.jsonl")).read_text().splitlines()
        split = {row["doc_id"]: row["filtered_resps"] for row in map(json.loads, lines)}
        assert len(split) == len(alone["samples"][name]) == 5
        for row in alone["samples"][name]:
            for a, b in zip(row["filtered_resps"], split[row["doc_id"]], strict=True):
                assert a == b if isinstance(a, str) else a[0] == pytest.approx(float(b[0]), abs=1e-3)


# ------------------------------------------------------------------ numbers
@pytest.mark.parametrize("estimator", ["elbo", "bernoulli", "chain", "pll"])
def test_loglikelihood_is_the_estimators_on_the_encoded_fact(toy, rows, estimator: str) -> None:
    """The template's separator takes the white space on both sides, so the ids are those of `encode`."""
    adapter = RemaskLM(toy, estimator=estimator, draws=4, replicates=2)
    keys = [adapter._row(None, row.prompt_ids, row.answer_ids).id for row in rows]
    expected = {
        "elbo": lambda: elbo(toy, rows, adapter.bank, keys=keys),
        "bernoulli": lambda: bernoulli(toy, rows, adapter.bank, keys=keys),
        "chain": lambda: chain(toy, rows),
        "pll": lambda: pll(toy, rows),
    }[estimator]()
    scored = adapter.loglikelihood([request(fact.prompt, f" {fact.answer}") for fact in FACTS], disable_tqdm=True)
    assert [value for value, _ in scored] == pytest.approx([score.logprob for score in expected], abs=1e-4)
    assert not any(greedy for _, greedy in scored)


def test_joint_tokenisation_without_a_separator(golden, toy) -> None:
    """Upstream's rule: trailing spaces go to the continuation, and the pair is cut from one tokenisation."""
    lm = type(golden)(golden.model, toy.tokenizer, golden.spec, "plain")
    adapter = RemaskLM(lm)
    context, continuation = adapter._encode_pair("Where was Ada Birk born?  ", "Lucca")
    assert toy.tokenizer.decode(context) == "Where was Ada Birk born?"
    assert context + continuation == adapter.tok_encode("Where was Ada Birk born?  Lucca")


def test_choices_share_masks_and_contexts_do_not(toy) -> None:
    adapter = RemaskLM(toy)
    same = [adapter._row(None, [5, 6, 7], answer).id for answer in ([8], [9, 9])]
    other = adapter._row(None, [5, 6], [8]).id
    bare = [adapter._row(None, [5], answer).id for answer in ([8], [9, 9])]  # documents behind a prefix token
    assert same[0] == same[1]
    assert len({same[0], other, *bare}) == 4


def test_rolling_scores_every_token_once(toy) -> None:
    """Two windows for a text longer than the context; with `chain` the sum is that over the windows by hand."""
    text = " ".join(fact.prompt + " " + fact.answer for fact in FACTS)
    adapter = RemaskLM(toy, estimator="chain")
    ids = adapter.tok_encode(text)
    room = toy.spec.max_length - 1
    assert room < len(ids) < 2 * room
    value = adapter.loglikelihood_rolling([request(text)], disable_tqdm=True)[0]
    first = chain(toy, [adapter._row(None, [adapter.prefix_token_id], ids[:room])])[0]
    rest = len(ids) - room
    second = chain(toy, [adapter._row(None, ids[len(ids) - room - 1 : -rest], ids[-rest:])])[0]
    assert first.tokens + second.tokens == len(ids)
    assert value == pytest.approx(first.logprob + second.logprob, abs=1e-3)
    assert adapter.loglikelihood_rolling([request("")], disable_tqdm=True) == [0.0]


def test_generation_is_cut_at_stop_strings_and_token_limits(taught) -> None:
    adapter = RemaskLM(taught)
    ask = "Which animal does Ada Birk keep?"

    def answer(**options: object) -> str:
        return adapter.generate_until([request(ask, {"until": [], **options})], disable_tqdm=True)[0]

    assert answer() == "a tame crow"
    assert answer(until=["crow", "zebra"]) == "a tame "
    assert answer(until=" tame") == "a"
    assert answer(until=["<sep>"]) == "a tame crow"
    limited = answer(max_gen_toks=2)
    assert "a tame crow".startswith(limited)
    assert limited == taught.tokenizer.decode(taught.tokenizer("a tame crow", add_special_tokens=False)["input_ids"][:2])


def test_conversations_are_rendered_once(toy) -> None:
    """Either the harness renders the chat template and contexts are used as they come, or the adapter does, not both."""
    jinja = "{% for m in messages %}<bos>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<sep>{% endif %}"
    messages = [{"role": "user", "content": "Who?"}]
    toy.spec = replace(toy.spec, chat_template=jinja, template="{prompt}")
    adapter = RemaskLM(toy)
    assert adapter.apply_chat_template(messages) == "<bos>Who?<sep>"
    assert adapter._encode_pair("<bos>Who?<sep>", "Ada") == (adapter.tok_encode("<bos>Who?<sep>"), adapter.tok_encode("Ada"))
    toy.spec = replace(toy.spec, template="<bos>{prompt}<sep>")
    with pytest.raises(RemaskError, match="twice"):
        adapter.apply_chat_template(messages)


# ------------------------------------------------------------------ refusals
def test_bad_arguments_are_refused(toy) -> None:
    for arguments, message in [
        ({"estimator": "exact"}, "estimator 'exact'"),
        ({"dtype": "float33"}, "dtype 'float33'"),
        ({"draws": 0}, "draws >= 1"),
        ({"gen_length": toy.spec.max_length}, "no room for a prompt"),
    ]:
        with pytest.raises(RemaskError, match=message):
            RemaskLM(toy, **arguments)
    adapter = RemaskLM(toy)
    with pytest.raises(RemaskError, match="asks for sampling"):
        adapter.generate_until([request("Who?", {"until": [], "temperature": 0.7})])
    with pytest.raises(RemaskError, match="no chat template"):
        adapter.apply_chat_template([{"role": "user", "content": "Who?"}])
    with pytest.raises(RemaskError, match="mask token"):
        adapter.loglikelihood([request("Who is <mask>?", " Ada")], disable_tqdm=True)
    with pytest.raises(RemaskError, match="does not fit"):
        adapter.loglikelihood([request("Who?", " Ada" * 100)], disable_tqdm=True)
    with pytest.raises(RemaskError, match="without tokens"):
        adapter.loglikelihood([request("Who?", "")], disable_tqdm=True)
