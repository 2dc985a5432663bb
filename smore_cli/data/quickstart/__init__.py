"""The quick-start data set: four small task families, made by `make.py` from hand-written material in this package.

`train.jsonl` has 1,800 rows and `test.jsonl` 380, a quarter each of:

* science      elementary facts (tables in science_living, science_matter, science_earth)
* arithmetic   two-step word problems with small numbers (arithmetic_stories)
* reformat     dates, times, units, lists, names and amounts in another form (reformat)
* labelling    a message, review or headline to one of the project's own label words (labelling_desk, _mood, _page)

A row is `{"id", "family", "question", "choices", "label"}`: multiple choice, `label` is the index of the right choice.
An id reads family/kind/material/wording; family/kind/material is the same for rows that ask about the same thing.
No test row has a near-duplicate in training; `split.py` says what that means, and tests/data/test_quickstart.py checks
it on the files.
"""
