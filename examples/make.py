"""Write facts.jsonl and retain.jsonl from the closed world."""

from pathlib import Path

from remask import save_facts
from remask.evaluation.benchmarks.registry import load_benchmark

here = Path(__file__).parent
world = load_benchmark("closed-world", None)
save_facts([fact for fact in world.forget if fact.group == world.forget[0].group], here / "facts.jsonl")
save_facts(world.fit, here / "retain.jsonl")
