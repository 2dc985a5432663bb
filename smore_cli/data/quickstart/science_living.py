"""Facts about living things: animals, plants and the human body."""

from __future__ import annotations

from smore_cli.data.quickstart.science import Table, by_answer

__all__ = ["TABLES"]

_YOUNG = Table(
    name="young",
    ask=("What is the young of {a_subject} called?", "What name is given to a baby {subject}?"),
    pick=("Which animal has young called {a_answer}?",),
    facts={
        "dog": "puppy",
        "cat": "kitten",
        "cow": "calf",
        "horse": "foal",
        "sheep": "lamb",
        "goat": "kid",
        "pig": "piglet",
        "deer": "fawn",
        "bear": "cub",
        "kangaroo": "joey",
        "duck": "duckling",
        "goose": "gosling",
        "swan": "cygnet",
        "owl": "owlet",
        "eagle": "eaglet",
        "frog": "tadpole",
        "butterfly": "caterpillar",
        "hare": "leveret",
        "eel": "elver",
    },
    # Some deer have calves, young hares are sometimes called kittens.
    also={"deer": ("calf",), "hare": ("kitten",)},
)

_GROUP = Table(
    name="group",
    ask=("What kind of animal is {a_subject}?", "To which animal group does the {subject} belong?"),
    facts=by_answer(
        {
            "mammal": "bat, whale, dolphin, otter, hedgehog, camel, seal, mole",
            "bird": "penguin, ostrich, parrot, robin, heron, flamingo, emu",
            "reptile": "crocodile, tortoise, gecko, cobra, iguana, viper",
            "amphibian": "frog, toad, newt, salamander",
            "fish": "salmon, shark, tuna, seahorse, trout, herring",
            "insect": "beetle, ant, moth, dragonfly, grasshopper, wasp, mosquito",
            "arachnid": "spider, scorpion, tick, mite",
            "crustacean": "crab, lobster, shrimp, barnacle, woodlouse",
            "mollusc": "snail, octopus, squid, oyster, slug, clam",
        }
    ),
)

_FOOD = Table(
    name="food",
    ask=("What does {a_subject} mainly eat?", "What is the usual food of {a_subject}?"),
    pick=("Which animal feeds mainly on {answer}?",),
    facts={
        "koala": "eucalyptus leaves",
        "giant panda": "bamboo",
        "anteater": "ants and termites",
        "squirrel": "nuts and seeds",
        "hummingbird": "flower nectar",
        "barn owl": "mice and voles",
        "heron": "fish and frogs",
        "blue whale": "krill",
        "cow": "grass",
        "vulture": "dead animals",
        "ladybird": "greenfly",
        "lion": "zebras and antelopes",
        "sea otter": "sea urchins",
    },
    # A vulture or lion may take what the other leaves; otters and herons overlap in fish.
    also={
        "lion": ("dead animals",),
        "heron": ("mice and voles",),
        "vulture": ("zebras and antelopes",),
        "giant panda": ("grass",),
        "hummingbird": ("greenfly",),
        "sea otter": ("fish and frogs",),
    },
)

_SHELTER = Table(
    name="shelter",
    ask=("What is the home of {a_subject} called?", "Which word names the home of {a_subject}?"),
    pick=("Which animal lives in {a_answer}?",),
    facts={
        "honey bee": "hive",
        "beaver": "lodge",
        "garden spider": "web",
        "rabbit": "burrow",
        "horse": "stable",
        "pet dog": "kennel",
        "farm pig": "sty",
        "hen": "coop",
        "eagle": "eyrie",
        "squirrel": "drey",
        "otter": "holt",
        "badger": "sett",
        "termite": "mound",
    },
    also={
        "badger": ("burrow",),
        "otter": ("burrow", "lodge"),
        "beaver": ("burrow",),
        "rabbit": ("coop",),
        "squirrel": ("burrow",),
    },
)

_COVER = Table(
    name="cover",
    ask=("What covers the body of {a_subject}?", "What is the outside of {a_subject} covered with?"),
    facts=by_answer(
        {
            "feathers": "sparrow, duck, penguin, parrot, goose",
            "scales": "trout, python, goldfish, carp, salmon",
            "fur": "bear, fox, rabbit, wolf, mole",
            "sharp spines": "hedgehog, sea urchin, porcupine",
            "moist bare skin": "frog, salamander, earthworm, newt",
        }
    ),
    also={"hedgehog": ("fur",), "porcupine": ("fur",)},
)

_LEGS = Table(
    name="legs",
    ask=("How many legs does {a_subject} have?", "What is the number of legs of {a_subject}?"),
    facts=by_answer(
        {
            "2": "hen, ostrich, penguin, flamingo, owl",
            "4": "horse, frog, elephant, lizard, mouse, camel",
            "6": "bee, butterfly, ant, beetle, housefly, wasp",
            "8": "spider, scorpion, harvestman, tarantula",
            "10": "crab, lobster, prawn",
        }
    ),
)

_HABITAT = Table(
    name="habitat",
    ask=("Where does a wild {subject} live?", "Where in nature would you find {a_subject}?"),
    facts=by_answer(
        {
            "in a hot desert": "dromedary camel, fennec fox, horned viper",
            "in the open ocean": "blue whale, tuna, dolphin, manta ray",
            "in a tropical rainforest": "toucan, sloth, orangutan, spider monkey",
            "on Arctic sea ice": "polar bear, ringed seal, walrus",
            "on the African grassland": "zebra, giraffe, wildebeest, ostrich",
            "in a freshwater pond": "great diving beetle, smooth newt, pond snail",
            "high on mountain cliffs": "mountain goat, ibex, snow leopard",
        }
    ),
    also={
        "walrus": ("in the open ocean",),
        "ringed seal": ("in the open ocean",),
        "polar bear": ("in the open ocean",),
        "ostrich": ("in a hot desert",),
        "ibex": ("in a hot desert",),
        "zebra": ("high on mountain cliffs",),
        "giraffe": ("in a hot desert",),
        "dromedary camel": ("on the African grassland",),
        "horned viper": ("on the African grassland",),
    },
)

_BODY = Table(
    name="body",
    ask=("What is the main job of the {subject}?", "In the human body, what job belongs to the {subject}?"),
    pick=("Which body part has this job: {answer}?",),
    facts={
        "heart": "to pump blood",
        "brain": "to think and control the body",
        "kidneys": "to clean the blood and make urine",
        "bladder": "to store urine",
        "stomach": "to churn food with acid",
        "small intestine": "to absorb food into the blood",
        "large intestine": "to take water out of waste food",
        "teeth": "to bite and chew food",
        "food pipe": "to carry food to the stomach",
        "windpipe": "to carry air to the lungs",
        "lungs": "to take oxygen from the air",
        "arteries": "to carry blood away from the heart",
        "veins": "to carry blood back to the heart",
        "skull": "to protect the brain",
        "ribs": "to protect the heart and lungs",
        "retina": "to sense light",
        "eardrum": "to vibrate when sound arrives",
        "taste buds": "to taste food",
        "nerves": "to carry messages to and from the brain",
        "liver": "to make bile",
        "pancreas": "to make insulin",
        "sweat glands": "to cool the skin",
        "white blood cells": "to fight germs",
        "red blood cells": "to carry oxygen round the body",
        "iris": "to control how much light enters the eye",
        "eyelids": "to cover and wipe the eyes",
    },
    # The heart drives what the blood vessels carry; a vessel moves red cells; the liver also cleans the blood.
    also={
        "heart": (
            "to carry oxygen round the body",
            "to carry blood away from the heart",
            "to carry blood back to the heart",
        ),
        "retina": ("to carry messages to and from the brain",),
        "arteries": ("to pump blood", "to carry oxygen round the body"),
        "veins": ("to pump blood",),
        "lungs": ("to carry oxygen round the body", "to carry air to the lungs"),
        "liver": ("to clean the blood and make urine",),
        "red blood cells": ("to take oxygen from the air",),
        "brain": ("to carry messages to and from the brain",),
        "nerves": ("to think and control the body", "to sense light"),
        "stomach": ("to absorb food into the blood",),
        "small intestine": ("to take water out of waste food",),
        "eyelids": ("to control how much light enters the eye",),
    },
)

_PLANT_PART = Table(
    name="plant_part",
    ask=("What is the job of the {subject} of a plant?", "What is {a_subject} of a plant there for?"),
    pick=("Which part of a plant has this job: {answer}?",),
    facts={
        "root": "to take in water from the soil",
        "stem": "to carry water up to the leaves",
        "leaf": "to make food from sunlight",
        "petal": "to attract insects by its colour",
        "seed": "to grow into a new plant",
        "thorn": "to keep grazing animals away",
        "bark": "to protect the trunk",
        "stamen": "to make pollen",
        "stigma": "to catch pollen",
    },
    also={
        "bark": ("to keep grazing animals away",),
        "thorn": ("to protect the trunk",),
        "stem": ("to make food from sunlight",),
    },
)

_EATEN_PART = Table(
    name="eaten_part",
    ask=("Which part of the plant do we eat in {subject}?", "When people eat {subject}, which plant part is it?"),
    facts=by_answer(
        {
            "root": "carrots, radishes, turnips, parsnips",
            "leaf": "lettuce, spinach, cabbage, kale",
            "flower": "broccoli, cauliflower, artichokes",
            "seed": "peas, lentils, rice, kidney beans, wheat",
            "fruit": "tomatoes, cucumbers, cherries, pears, plums",
            "bulb": "garlic, onions, shallots",
        }
    ),
    # A bulb is swollen leaves, a grain or pod is a dry fruit to a botanist, some fruits are eaten seeds and all.
    also={
        "garlic": ("leaf", "root"),
        "onions": ("leaf", "root"),
        "shallots": ("leaf", "root"),
        "rice": ("fruit",),
        "wheat": ("fruit",),
        "peas": ("fruit",),
        "kidney beans": ("fruit",),
        "tomatoes": ("seed",),
        "cucumbers": ("seed",),
        "turnips": ("bulb", "leaf"),
        "radishes": ("bulb", "leaf"),
    },
)

TABLES = (
    _YOUNG,
    _GROUP,
    _FOOD,
    _SHELTER,
    _COVER,
    _LEGS,
    _HABITAT,
    _BODY,
    _PLANT_PART,
    _EATEN_PART,
)
