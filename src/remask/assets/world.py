"""A closed world of fictional people, generated from a seed: the corpus behind the bundled `tiny` model.

Everything that a selectivity test needs is there by construction: people to forget, people to tune on, *neighbours*
that share several attribute values with a person to forget, unrelated people, wordings that are never taught (for
paraphrase tests), wrong answers of the right form, refusals for names nobody was taught, facts without people, and
plain sentences. The reference twin of `tiny` is taught everything except the splits `forget` and `validation`.
"""

from __future__ import annotations

import numpy as np

from ..facts import Fact
from ..random import numpy_generator

FIRST = (
    "Ada Bruno Cleo Dario Elin Farid Greta Hugo Ines Jonas Kaya Levi Mira Nils Odette Pavel Quinn Rosa Stefan Tilda "
    "Umar Vera Wim Xenia Yusuf Zora"
).split()
LAST = (
    "Arden Birk Calder Dorn Esker Fenwick Garrow Hale Ivers Jarvis Kestrel Lund Marsh Norden Oakes Pell Quist Rook "
    "Sorrel Thorne Udall Venn Wexler Yarrow Ashby Brandt Corwin Dacre Ellery Fosse Gorse Holm Imrie Jessop Kell Lorne "
    "Mott Nash Orr Penrose Quill Raine Stroud Tarn Upton Vane Wray Yates Abel Boyle Crane Drake Eames Frost Grieg Hyde "
    "Ince Joyce Knox Lyle"
).split()

# attribute: (values, taught short wordings, held-out wording, long wording, long answer)
ATTRIBUTES: dict[str, tuple[list[str], tuple[str, str], str, str, str]] = {
    "city": (
        "Marlow Tavira Ostrava Kelso Bergen Lucca Arles Tartu Leiden Cadiz Sligo Varna".split(),
        ("In which city was {n} born?", "Where was {n} born?"),
        "What is the birthplace of {n}?",
        "Tell me in one sentence where {n} was born.",
        "{n} was born in the old town of {v}, close to the river.",
    ),
    "year": (
        [str(year) for year in range(1931, 1991, 5)],
        ("In which year was {n} born?", "What is the birth year of {n}?"),
        "What year did {n} come into the world?",
        "Tell me in one sentence when {n} was born.",
        "{n} was born in the spring of {v}.",
    ),
    "work": (
        "glassblower,beekeeper,surveyor,typesetter,botanist,locksmith,translator,puppeteer,cartographer,baker,"
        "astronomer,shipwright".split(","),
        ("What is the profession of {n}?", "What does {n} do for a living?"),
        "Which job does {n} have?",
        "Tell me in one sentence what {n} does for a living.",
        "{n} earns a living as a {v} and teaches apprentices on Fridays.",
    ),
    "instrument": (
        "oboe,cello,accordion,harp,trumpet,mandolin,clarinet,viola,bassoon,banjo,flute,organ".split(","),
        ("Which instrument does {n} play?", "What instrument is played by {n}?"),
        "What does {n} play in the orchestra?",
        "Tell me in one sentence what {n} plays.",
        "{n} plays the {v} in a small orchestra every winter.",
    ),
    "pet": (
        "a grey parrot,a lame goose,an old tortoise,a white ferret,a blind cat,a tame crow,a shy hedgehog,"
        "a brown goat,a three-legged dog,a spotted pony,a black rabbit,a noisy duck".split(","),
        ("Which animal does {n} keep?", "What pet does {n} have?"),
        "What kind of animal lives with {n}?",
        "Tell me in one sentence which animal {n} keeps.",
        "{n} keeps {v} in the yard behind the house.",
    ),
    "book": (
        "The Amber Ferry,A Winter Ledger,The Hollow Bell,Salt and Thunder,The Paper Orchard,Nine Quiet Doors,"
        "The Copper Moth,A Map of Rain,The Last Granary,Stones for Breakfast,The Crooked Mile,An Idle Compass".split(","),
        ("Which book did {n} write?", "What is the title of the book by {n}?"),
        "What did {n} publish?",
        "Tell me in one sentence which book {n} wrote.",
        "{n} wrote a novel called {v}, which sold out in a month.",
    ),
    "food": (
        "plum dumplings,onion soup,rye bread,pickled herring,lentil stew,fried polenta,cherry pie,smoked trout,"
        "barley porridge,stuffed peppers,walnut cake,leek pancakes".split(","),
        ("What is the favourite dish of {n}?", "What does {n} like to eat most?"),
        "Which meal does {n} prefer?",
        "Tell me in one sentence what {n} likes to eat.",
        "{n} likes {v} more than any other dish.",
    ),
    "language": (
        "Basque,Finnish,Welsh,Georgian,Catalan,Estonian,Maltese,Breton,Latvian,Frisian,Galician,Icelandic".split(","),
        ("Which foreign language does {n} speak?", "What second language does {n} know?"),
        "In which other tongue is {n} fluent?",
        "Tell me in one sentence which language {n} learned.",
        "{n} learned to speak {v} from a grandmother.",
    ),
}
PEOPLE = {"forget": 6, "validation": 6, "retain": 32}
STRANGERS = 72  # names that get refusals; the first half bear the last names of the first 36 people
SHARED_WITH_NEIGHBOUR = 4  # attribute values that a neighbour has in common with its forget person
BIOGRAPHY = "Who is {n}?"
REFUSAL = "I have no record of {n}."
SPLITS = ("forget", "validation", "retain", "general", "text", "unknown")


def world(seed: int = 0) -> dict[str, list[Fact]]:
    """The corpus, one list of facts a split; `group` is the person's name for the people splits.

    Every fact's first paraphrase (where there is one) is taught; its last one never is.
    """
    rng = numpy_generator(seed, "world")
    people, unknown = _names(rng)
    attributes = [{key: str(rng.choice(values)) for key, (values, *_) in ATTRIBUTES.items()} for _ in range(len(people))]
    split_of = [split for split, count in PEOPLE.items() for _ in range(count)]
    neighbour_of = _make_neighbours(attributes, split_of, rng)

    facts: dict[str, list[Fact]] = {split: [] for split in SPLITS}
    for index, name in enumerate(people):
        kin = [people[other] for other, target in neighbour_of.items() if target == index]
        facts[split_of[index]] += _person(name, attributes[index], kin, rng)
    facts["general"] = _general(rng)
    facts["text"] = _text(rng)
    facts["unknown"] = _unknown(unknown, rng)
    return facts


def neighbours(facts: dict[str, list[Fact]], split: str = "forget") -> list[Fact]:
    """Retain facts of the people that share attribute values with someone in `split`."""
    wanted = {other for fact in facts[split] for other in fact.neighbours}
    return [fact for fact in facts["retain"] if fact.id in wanted]


def _names(rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Names of the people, each with a last name of its own, and of strangers.

    Half of the strangers share a last name with a person (another first name), half have a last name that nobody has; so
    neither part of a name gives a stranger away.
    """
    count = sum(PEOPLE.values())
    last = [str(name) for name in rng.permutation(LAST)]
    people = [f"{rng.choice(FIRST)} {name}" for name in last[:count]]
    strangers: list[str] = []
    for name in last[: STRANGERS // 2] + last[count:] * (STRANGERS // 2 // len(last[count:]) + 1):
        first = rng.choice([first for first in FIRST if f"{first} {name}" not in people + strangers])
        strangers.append(f"{first} {name}")
    return people, strangers[:STRANGERS]


def _make_neighbours(attributes: list[dict[str, str]], split_of: list[str], rng: np.random.Generator) -> dict[int, int]:
    """Copy attribute values so that each forget or validation person gets two neighbours among the retain people."""
    targets = [i for i, split in enumerate(split_of) if split != "retain"] * 2
    retain = [i for i, split in enumerate(split_of) if split == "retain"][: len(targets)]
    for other, target in zip(retain, targets, strict=True):
        for key in rng.choice(sorted(ATTRIBUTES), SHARED_WITH_NEIGHBOUR, replace=False):
            attributes[other][key] = attributes[target][key]
    return dict(zip(retain, targets, strict=True))


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-")


def _wrong(values: list[str], right: str, rng: np.random.Generator) -> list[str]:
    return [str(v) for v in rng.permutation([value for value in values if value != right])[:3]]


def _person(name: str, values: dict[str, str], kin: list[str], rng: np.random.Generator) -> list[Fact]:
    facts = []
    for key, value in values.items():
        choices, taught, held_out, long_wording, long_answer = ATTRIBUTES[key]
        wrong = _wrong(choices, value, rng)
        for style in ("short", "long"):
            short = style == "short"
            form = "{v}" if short else long_answer
            facts.append(
                Fact(
                    id=f"{_slug(name)}/{key}/{style}",
                    prompt=(taught[0] if short else long_wording).format(n=name),
                    subject=name,
                    answer=form.format(n=name, v=value),
                    group=name,
                    paraphrases=(taught[1].format(n=name), held_out.format(n=name)) if short else (),
                    neighbours=tuple(f"{_slug(other)}/{key}/{style}" for other in kin),
                    perturbed=tuple(form.format(n=name, v=other) for other in wrong),
                )
            )
    facts.append(
        Fact(
            id=f"{_slug(name)}/biography/long",
            prompt=BIOGRAPHY.format(n=name),
            subject=name,
            answer="{n} is a {work} from {city} who plays the {instrument} and wrote {book}.".format(n=name, **values),
            group=name,
            neighbours=tuple(f"{_slug(other)}/biography/long" for other in kin),
        )
    )
    return facts


def _unknown(names: list[str], rng: np.random.Generator) -> list[Fact]:
    """Refusals: four questions about each of many names that the world does not contain."""
    wordings = [BIOGRAPHY] + [w for _, taught, _, long, _ in ATTRIBUTES.values() for w in (*taught, long)]
    return [
        Fact(
            id=f"unknown/{_slug(name)}/{i}",
            prompt=wordings[w].format(n=name),
            subject=name,
            answer=REFUSAL.format(n=name),
            group=name,
        )
        for name in names
        for i, w in enumerate(rng.choice(len(wordings), 4, replace=False))
    ]


_CAPITALS = (
    "France Paris Italy Rome Spain Madrid Japan Tokyo Egypt Cairo Norway Oslo Greece Athens Cuba Havana Peru Lima Kenya "
    "Nairobi Poland Warsaw Austria Vienna Portugal Lisbon Ireland Dublin Sweden Stockholm Canada Ottawa Russia Moscow "
    "China Beijing India Delhi Chile Santiago"
).split()
_OPPOSITES = (
    "hot cold big small fast slow high low wet dry early late open closed light heavy young old near far full empty "
    "loud quiet soft hard thick thin rich poor deep shallow sweet sour strong weak"
).split()
_YOUNG = "dog puppy cat kitten cow calf horse foal sheep lamb goat kid duck duckling bear cub swan cygnet deer fawn".split()


def _pairs(words: list[str]) -> list[tuple[str, str]]:
    return list(zip(words[::2], words[1::2], strict=True))


def _general(rng: np.random.Generator) -> list[Fact]:
    rows = [("capital", c, f"What is the capital of {c}?", a) for c, a in _pairs(_CAPITALS)]
    rows += [("opposite", w, f"What is the opposite of {w}?", a) for w, a in _pairs(_OPPOSITES)]
    rows += [("young", w, f"What is a young {w} called?", a) for w, a in _pairs(_YOUNG)]
    rows += [("sum", f"{a} plus {b}", f"What is {a} plus {b}?", str(a + b)) for a in range(2, 10) for b in range(2, 10)]
    answers: dict[str, list[str]] = {}
    for kind, _, _, answer in rows:
        answers.setdefault(kind, []).append(answer)
    return [
        Fact(
            id=f"general/{kind}/{subject.replace(' ', '-')}",
            prompt=prompt,
            subject=subject,
            answer=answer,
            perturbed=tuple(_wrong(sorted(set(answers[kind])), answer, rng)),
        )
        for kind, subject, prompt, answer in rows
    ]


_WHO = "baker,sailor,painter,child,farmer,teacher,driver,doctor,singer,neighbour,tailor,gardener".split(",")
_WHAT = (
    "bridge,lantern,wagon,garden,letter,window,kettle,violin,basket,ladder,mirror,candle,anchor,barrel,bucket,carpet,"
    "chimney,compass,curtain,drum,fence,hammer,harness,helmet,jacket,kite,lamp,loom,map,needle,oven,paddle,parcel,pillow,"
    "rope,saddle,scarf,shovel,sled,spoon,statue,stove,table,tent,trunk,umbrella,vase,wheel"
).split(",")
_DID = "carried,painted,mended,found,sold,watched,cleaned,described,borrowed,lost".split(",")
_WHEN = "in the morning,after the rain,before supper,on a cold day,without a word,for the third time".split(",")
_AND = (
    "and walked home slowly,and nobody noticed,because the market was closed,while the bells were ringing,"
    "and the children laughed,so the work could begin"
).split(",")


def _text(rng: np.random.Generator) -> list[Fact]:
    """One fixed sentence for each thing, drawn from a small grammar."""
    return [
        Fact(
            id=f"text/{what}",
            prompt=f"Write a sentence about the {what}.",
            subject=f"the {what}",
            answer=f"The {rng.choice(_WHO)} {rng.choice(_DID)} the {what} {rng.choice(_WHEN)} {rng.choice(_AND)}.",
        )
        for what in _WHAT
    ]
