"""Facts about matter, forces, energy, measuring and the people who study them."""

from __future__ import annotations

from smore_cli.data.quickstart.science import Table, by_answer

__all__ = ["TABLES"]

_STATE = Table(
    name="state",
    ask=("Which state of matter is {subject}?", "What is the state of matter of {subject}?"),
    facts=by_answer(
        {
            "solid": "a gold ring, a wooden spoon, an ice cube, a grain of salt, a copper coin, a brick",
            "liquid": "fresh milk, vinegar, petrol, cooking oil, apple juice, rain water",
            "gas": "the air in a tyre, the helium in a balloon, the oxygen in a room, the bubbles in lemonade",
        }
    ),
    more=("plasma",),
)

_INSTRUMENT = Table(
    name="instrument",
    ask=("What does {a_subject} measure?", "What can you find out with {a_subject}?"),
    pick=("Which instrument measures {answer}?", "What would you use to measure {answer}?"),
    facts={
        "thermometer": "temperature",
        "barometer": "air pressure",
        "anemometer": "wind speed",
        "wind vane": "wind direction",
        "rain gauge": "rainfall",
        "hygrometer": "humidity",
        "stopwatch": "the time of a race",
        "tape measure": "length",
        "kitchen scale": "mass",
        "measuring jug": "the volume of a liquid",
        "protractor": "angles",
        "voltmeter": "voltage",
        "ammeter": "electric current",
        "newton meter": "force",
        "speedometer": "the speed of a car",
        "odometer": "the distance driven by a car",
        "altimeter": "height above sea level",
        "pH meter": "acidity",
        "Geiger counter": "radioactivity",
        "seismograph": "the shaking of the ground",
        "pedometer": "the number of steps walked",
        "sound level meter": "loudness",
        "light meter": "brightness",
    },
    # A barometer tells height, a tape measure could be laid along a road, and hanging scales measure a force.
    also={
        "barometer": ("height above sea level",),
        "altimeter": ("air pressure",),
        "newton meter": ("mass",),
        "kitchen scale": ("force", "the volume of a liquid"),
        "measuring jug": ("rainfall",),
        "rain gauge": ("the volume of a liquid",),
        "pedometer": ("the distance driven by a car",),
        "odometer": ("length",),
        "speedometer": ("the distance driven by a car",),
        "anemometer": ("wind direction",),
    },
)

_UNIT = Table(
    name="unit",
    ask=("What is measured in {subject}?", "Which quantity has the unit {subject}?"),
    pick=("In which unit is {answer} measured?",),
    facts={
        "metres": "length",
        "kilograms": "mass",
        "seconds": "time",
        "degrees Celsius": "temperature",
        "amperes": "electric current",
        "volts": "voltage",
        "ohms": "electrical resistance",
        "watts": "power",
        "joules": "energy",
        "newtons": "force",
        "pascals": "pressure",
        "hertz": "frequency",
        "litres": "volume",
        "decibels": "loudness",
        "square metres": "area",
        "metres per second": "speed",
    },
)

_SOURCE = Table(
    name="source",
    ask=("What is {subject} made from?", "From which raw material do we get {subject}?"),
    pick=("What do people make from {answer}?",),
    facts={
        "glass": "sand",
        "paper": "wood pulp",
        "cheese": "milk",
        "knitting wool": "the fleece of sheep",
        "silk": "the cocoons of caterpillars",
        "leather": "animal skins",
        "plastic": "crude oil",
        "steel": "iron ore",
        "bread flour": "wheat grains",
        "natural rubber": "the sap of a tree",
        "chocolate": "cocoa beans",
        "white sugar": "sugar cane",
        "raisins": "grapes",
        "linen": "flax stems",
        "pottery": "clay",
        "tofu": "soya beans",
        "popcorn": "maize kernels",
        "aluminium foil": "bauxite",
        "cider": "apples",
        "porridge": "oats",
    },
    # Sand and grit are mixed into some clays; some paper is made of flax; some plastics come from maize or milk.
    also={
        "pottery": ("sand",),
        "paper": ("flax stems", "sugar cane", "wheat grains", "clay"),
        "plastic": ("maize kernels", "milk", "wood pulp", "sugar cane", "the sap of a tree"),
        "glass": ("clay",),
        "chocolate": ("milk",),
        "porridge": ("wheat grains", "maize kernels"),
        "bread flour": ("maize kernels", "oats"),
        "white sugar": ("maize kernels", "the sap of a tree"),
        "natural rubber": ("crude oil",),
        "leather": ("crude oil", "the fleece of sheep"),
        "cheese": ("soya beans",),
        "linen": ("wood pulp",),
        "silk": ("wood pulp",),
        "knitting wool": ("crude oil",),
    },
)

_CONVERTS = Table(
    name="converts",
    ask=(
        "Into what is {a_subject} meant to turn electricity?",
        "What useful thing does {a_subject} make from electricity?",
    ),
    facts=by_answer(
        {
            "heat": "kettle, toaster, clothes iron, electric oven, electric blanket",
            "sound": "loudspeaker, doorbell, radio, siren, buzzer",
            "light": "torch, street lamp, traffic signal, desk lamp, lighthouse lamp",
            "movement": "ceiling fan, power drill, electric train, lift motor, food mixer",
        }
    ),
)

_KIND_OF_MATERIAL = Table(
    name="material",
    ask=("What kind of material is {subject}?", "Which group of materials includes {subject}?"),
    facts=by_answer(
        {
            "wood": "oak, pine, mahogany, balsa, teak, ebony",
            "metal": "copper, tin, aluminium, zinc, silver, lead, nickel",
            "cloth": "denim, velvet, corduroy, tweed, flannel",
            "rock": "granite, marble, slate, basalt, limestone, sandstone",
            "plastic": "polythene, PVC, polystyrene, perspex",
        }
    ),
)

_SYMBOL = Table(
    name="symbol",
    ask=("What is the chemical symbol of {subject}?", "In the periodic table, what stands for {subject}?"),
    pick=("Which element has the chemical symbol {answer}?",),
    facts={
        "oxygen": "O",
        "hydrogen": "H",
        "carbon": "C",
        "nitrogen": "N",
        "iron": "Fe",
        "gold": "Au",
        "silver": "Ag",
        "sodium": "Na",
        "potassium": "K",
        "copper": "Cu",
        "lead": "Pb",
        "tin": "Sn",
        "helium": "He",
        "calcium": "Ca",
        "zinc": "Zn",
        "aluminium": "Al",
        "chlorine": "Cl",
        "sulfur": "S",
        "neon": "Ne",
        "magnesium": "Mg",
    },
)

_MACHINE = Table(
    name="machine",
    ask=("Which simple machine is {a_subject}?", "What type of simple machine is {a_subject}?"),
    facts=by_answer(
        {
            "a lever": "see-saw, crowbar, bottle opener, rowing oar",
            "a pulley": "flagpole rope, crane hoist, window blind cord",
            "a wedge": "chisel, splitting axe head, door stop",
            "a screw": "jar lid thread, corkscrew, light bulb thread",
            "a ramp": "wheelchair slope, playground slide, sloping loading board",
        }
    ),
    also={"door stop": ("a ramp",), "corkscrew": ("a lever",), "splitting axe head": ("a lever",)},
)

_SCIENTIST = Table(
    name="scientist",
    ask=("What does {a_subject} study?", "What does the work of {a_subject} deal with?"),
    pick=("Which scientist studies {answer}?",),
    facts={
        "botanist": "plants",
        "zoologist": "animals",
        "geologist": "rocks",
        "astronomer": "stars and planets",
        "meteorologist": "the weather",
        "palaeontologist": "fossils",
        "entomologist": "insects",
        "ornithologist": "birds",
        "volcanologist": "volcanoes",
        "seismologist": "earthquakes",
        "mycologist": "fungi",
        "archaeologist": "remains of past people",
        "cardiologist": "the heart",
        "dermatologist": "the skin",
        "oceanographer": "the sea",
        "linguist": "languages",
        "neurologist": "the nervous system",
        "geneticist": "how traits are inherited",
    },
    also={
        "zoologist": ("insects", "birds", "how traits are inherited", "fossils"),
        "botanist": ("fungi", "how traits are inherited"),
        "geologist": ("volcanoes", "earthquakes", "fossils", "the sea"),
        "volcanologist": ("rocks", "earthquakes"),
        "seismologist": ("volcanoes", "rocks"),
        "palaeontologist": ("rocks", "animals", "plants", "remains of past people"),
        "entomologist": ("animals",),
        "ornithologist": ("animals",),
        "oceanographer": ("the weather", "animals", "plants"),
        "geneticist": ("animals", "plants"),
        "archaeologist": ("fossils", "languages"),
        "mycologist": ("plants",),
        "meteorologist": ("the sea",),
    },
)

_FORCE = Table(
    name="force",
    ask=("What does {subject} do?", "Complete the sentence: the force called {subject} ..."),
    pick=("What is the name of the force that {answer}?",),
    facts={
        "gravity": "pulls things towards the Earth",
        "friction": "slows surfaces that rub together",
        "magnetism": "attracts iron nails",
        "air resistance": "slows a falling parachute",
        "buoyancy": "pushes a boat up in water",
        "static electricity": "makes combed hair stand up",
    },
    also={
        "air resistance": ("slows surfaces that rub together",),
        "friction": ("slows a falling parachute", "makes combed hair stand up"),
    },
)

TABLES = (
    _STATE,
    _INSTRUMENT,
    _UNIT,
    _SOURCE,
    _CONVERTS,
    _KIND_OF_MATERIAL,
    _SYMBOL,
    _MACHINE,
    _SCIENTIST,
    _FORCE,
)
