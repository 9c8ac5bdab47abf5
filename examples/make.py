"""Write facts.jsonl, retain.jsonl and the harness' questions from the closed world."""

import json
from pathlib import Path

from remask import save_facts
from remask.evaluation.benchmarks.registry import load_benchmark

here = Path(__file__).parent
world = load_benchmark("closed-world", None)
save_facts([fact for fact in world.forget if fact.group == world.forget[0].group], here / "facts.jsonl")
save_facts(world.fit, here / "retain.jsonl")

asked = [fact for fact in world.scored["retain"] if fact.id.endswith("/short")]
rows = [{"question": f.prompt, "answer": f.answer, "choices": sorted({f.answer, *f.perturbed})} for f in asked]
(here / "harness" / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
