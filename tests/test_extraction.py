"""Extraction: structures that are cut, texts that are left alone, the reasons that refuse a block, titles and costs."""
import random
import time

import pytest

from aspd import join
from data import extract

FUZZED = 3000  # random texts, a few seconds
WALK = "walk for half an hour before breakfast, whatever the weather is like outside"
REST = "keep the bedroom cool and dark, and leave every screen in another room at night"
FOOD = "plan the meals of a week on Sunday so that shopping takes a single trip to town"


def blocks(answer, prompt=""):
    """The blocks of an answer as lists of branches; checks on the way that nothing is lost."""
    segments, refusals = extract(answer, prompt)
    assert join(segments) == answer and all(segments)
    assert all(0 <= start < end <= len(answer) for _, start, end in refusals)
    return [s for s in segments if not isinstance(s, str)]


def reasons(answer, prompt=""):
    return [reason for reason, _, _ in extract(answer, prompt)[1]]


# -----------------------------------------------------------------------------
# structures: an answer and how its branches open

NAMES = ["Move", "Sleep", "Eat"]
MARKERS = {
    "1.": ["1. ", "2. ", "3. "], "1)": ["1) ", "2) ", "3) "], "(1)": ["(1) ", "(2) ", "(3) "],
    "lazy 1.": ["1. ", "1. ", "1. "], "a.": ["a. ", "b. ", "c. "], "i.": ["i. ", "ii. ", "iii. "],
    "-": ["- "] * 3, "*": ["* "] * 3, "bullet": ["• "] * 3, "indented": ["  - "] * 3,
    "#": ["# "] * 3, "##": ["## "] * 3, "bold number": ["**1. ", "**2. ", "**3. "],
}


@pytest.mark.parametrize("marker", MARKERS)
def test_every_marker_opens_branches(marker):
    """Lists and headings are cut where their markers stand, and the lead stays serial."""
    bold = "**" if marker == "bold number" else ""
    items = [f"{m}{name}{bold}{chr(10) if '#' in m else ': '}{body}.\n" for m, name, body in
             zip(MARKERS[marker], NAMES, [WALK, REST, FOOD])]
    answer = "Three habits help most people:\n\n" + "".join(items)
    [block] = blocks(answer)
    assert [b.text for b in block] == items
    assert [b.title.strip(" *") for b in block] == [f"{m}{n}".strip(" *") for m, n in zip(MARKERS[marker], NAMES)]


STRUCTURES = {  # answer, the first words of every branch
    "items separated by blank lines": (
        f"Try this:\n\n1. **Move**: {WALK}.\n\n2. **Sleep**: {REST}.\n\n3. **Eat**: {FOOD}.\n\nGood luck!",
        [["1. **Move", "2. **Sleep", "3. **Eat"]]),
    "continuation lines": (
        f"1. Move\n{WALK}.\nEven slowly.\n2. Sleep\n{REST}.\nEvery night.\n", [["1. Move", "2. Sleep"]]),
    "nested bullets stay with their item": (
        f"1. Morning:\n   - {WALK}\n   - drink water\n"
        f"2. Evening:\n   - {REST}\n   - read\n", [["1. Morning", "2. Evening"]]),
    "the outermost level is cut": (
        f"## Body\n\n1. Walk: {WALK}.\n"
        f"2. Rest: {REST}.\n\n## Kitchen\n\n1. Plan: {FOOD}.\n2. Store: freeze half of it.\n",
        [["## Body", "## Kitchen"]]),
    "sections of several paragraphs": (
        f"## Body\n\n{WALK}.\n\nSlowly.\n\n## Mind\n\n{REST}.\n\nDaily.\n\nAlone.\n\n## Food\n\n{FOOD}.\n\nCheaply.\n",
        [["## Body", "## Mind", "## Food"]]),
    "a title above the sections is not one of them": (
        f"# Healthy days\n\n# Body\n\n{WALK}.\n\n# Mind\n\n{REST}.\n", [["# Body", "# Mind"]]),
    "underlined headings": (f"Body\n----\n\n{WALK}.\n\nMind\n----\n\n{REST}.\n", [["Body\n--", "Mind\n--"]]),
    "bold lines": (f"**Body**\n\n{WALK}.\n\n**Mind**\n\n{REST}.\n", [["**Body", "**Mind"]]),
    "label lines": (f"Body:\n{WALK}.\n\nMind:\n{REST}.\n", [["Body:", "Mind:"]]),
    "labels of eight words": (
        f"Good habits for the body and its muscles:\n\n- {WALK}\n\nGood habits for the mind and its rest:\n\n- {REST}\n",
        [["Good habits for the body", "Good habits for the mind"]]),
    "labelled paragraphs": (f"Body: {WALK}.\n\nMind: {REST}.\n\nFood: {FOOD}.", [["Body:", "Mind:", "Food:"]]),
    "reasons in paragraphs": (
        f"One reason is health: {WALK}.\n\nAnother reason is calm: {REST}.\n\n", [["One reason", "Another reason"]]),
    "First, Second": (f"First, {WALK}.\n\nSecond, {REST}.\n\nFinally, {FOOD}.\n", [["First,", "Second,"]]),
    "two lists with prose between": (
        f"It helps a lot to begin with two things:\n\n- Walk: {WALK}.\n- Plan: {FOOD}.\n\nAnd to drop two others:\n\n"
        f"- Coffee: none after noon, since it keeps most people awake long into the night.\n- Screens: {REST}.\n",
        [["- Walk", "- Plan"], ["- Coffee", "- Screens"]]),
    "fields of the items are no items": (
        f"1. Ash\nHeight: thirty metres, {WALK}\nUse: tools\n2. Elm\nHeight: twenty metres, {REST}\nUse: boats\n",
        [["1. Ash", "2. Elm"]]),
    "Roman numbers hold letters": (
        f"I. Body\nA. Walking: {WALK}\nB. Running\nII. Mind\nA. Sleep: {REST}\nB. Reading\n",
        [["I. Body", "II. Mind"]]),
    "Chinese": ("建议如下：\n\n一、早睡：每天晚上十点以前上床睡觉，保持卧室安静。\n二、运动：每天早上散步三十分钟，风雨无阻。\n",
                [["一、早睡", "二、运动"]]),
    "Chinese labels": ("早睡：每天晚上十点以前上床睡觉，保持卧室安静。\n\n运动：每天早上散步三十分钟，风雨无阻，坚持一年。\n",
                       [["早睡", "运动"]]),
    "numbered labels hold labels": (
        f"Review 1:\nTitle: Calm\n\n{WALK}.\n\nSlowly.\n\nReview 2:\nTitle: Busy\n\n{REST}.\n\nDaily.\n",
        [["Review 1:", "Review 2:"]]),
    "days": (f"Day 1: Oslo\n- {WALK}\n- eat\nDay 2: Rome\n- {REST}\n- drink\n", [["Day 1", "Day 2"]]),
    "letters keep their greeting": (
        f"Subject: Offer\n\nDear Ms Ray,\n\nWe offer:\n\n- Walks: {WALK}.\n- Meals: {FOOD}.\n\nYours,\nAnn",
        [["- Walks", "- Meals"]]),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structure_is_cut_where_its_parts_start(name):
    answer, expected = STRUCTURES[name]
    found = blocks(answer)
    assert [len(block) for block in found] == [len(openings) for openings in expected], reasons(answer)
    for block, openings in zip(found, expected):
        for branch, opening in zip(block, openings):
            assert branch.text.startswith(opening), branch


def test_text_after_a_list_is_serial():
    """A paragraph below the last item belongs to the answer, not to the item."""
    segments, _ = extract(f"- Walk: {WALK}.\n- Rest: {REST}.\n\nStart today.")
    assert segments[-1] == "Start today."


def test_long_lists_are_grouped_in_order():
    """Forty items become at most sixteen branches, neighbours together, titled by their first item."""
    items = [f"{i}. Town{i}: a quiet place with an old harbour and a market on Fridays.\n" for i in range(1, 41)]
    [block] = blocks("".join(items))
    assert 4 <= len(block) <= 16 and "".join(b.text for b in block) == "".join(items)
    assert all(b.text.startswith(b.title) and b.text.count("\n") == block[0].text.count("\n") for b in block[:-1])


UNTOUCHED = {
    "prose": f"People who {WALK} tend to sleep well.\n\nThey also {REST}.\n\nMost of them {FOOD}.",
    "code": f"```yaml\n- walk: {WALK}\n- rest: {REST}\n- food: {FOOD}\n```\n",
    "fence of tildes": f"~~~\n1. {WALK}\n2. {REST}\n3. {FOOD}\n~~~\n",
    "table": f"| Habit | How |\n|---|---|\n| - Walk | {WALK} |\n| - Rest | {REST} |\n",
    "poem": ("The harbour sleeps, the lamps are low,\nThe tide returns as tides will go,\n\n"
        "And one by one the boats come in\nWith silver cargo, fin by fin."),
    "lyrics": f"Verse 1:\nOh {WALK}\n\nChorus:\nOh {REST}\n\nVerse 2:\nOh {FOOD}\n",
    "dialogue": f"Ann: Did you {WALK}?\n\nBen: No, I had to {REST}.\n\nAnn: And did you {FOOD}?\n\nBen: Not yet.",
    "stage directions": f"Ann (smiling): Come and {WALK}!\n\nBen (yawning): I would rather {REST}.\n",
    "letter": f"Subject: Holiday\n\nDear Ben,\n\nI hope you {WALK}. Do you still {FOOD}?\n\nYours,\nAnn",
    "fields of one thing": f"Name: the lighthouse where people {WALK}\nPower: {REST}\nPast: {FOOD}\n",
    "sentences with a colon": (f"Plugging the two values in, we get:\n{WALK}.\n\n"
        f"Nobody knows why, but the outcome is:\n{REST}.\n"),
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_text_without_independent_parts_stays_serial(name):
    assert blocks(UNTOUCHED[name]) == []


# -----------------------------------------------------------------------------
# refusals: two or three parts that look like a list, and why they are not independent

REFUSED = {  # reason: answers
    "titles are not distinct": [
        f"Q: Why walk?\n\nA: Because {WALK}.\n\nQ: Why rest?\n\nA: Because {REST}.\n"],
    "works on what its siblings say": [
        f"1. Cats: {WALK}.\n2. Dogs: {REST}.\n3. Overall, both are fine pets, and the choice is yours to make.\n"],
    "is a song or a play": [
        UNTOUCHED["lyrics"], UNTOUCHED["stage directions"],
        f"Panel 1: A fox has to {WALK}.\n\nPanel 2: It now wants to {REST}.\n"],
    "solves an equation": [
        "1. Move the constant, since only the unknown should stay on the left side:\n3x = 12 - 3\n"
        "2. Divide, since a single unknown is what the question asks us to find here:\nx = 3\n"],
    "steps of one recipe": [
        f"1. **Mix:** Whisk the eggs with sugar, then {REST}.\n"
        f"2. **Bake:** Pour the mixture into a tin, then {WALK}.\n"],
    "opens by going on": [
        f"1. Rome grew because people {WALK}.\n2. As a result, its neighbours had to {REST} and {FOOD}.\n",
        f"1. Have you ever had to {REST}?\n2. If yes, tell us how you {WALK} and {FOOD}.\n"],
    "points at a sibling": [
        f"1. Walk: {WALK}.\n2. Rest: as mentioned above, {REST}.\n",
        f"1. Walk: {WALK}.\n2. Rest: go back to step 1 and {REST}.\n",
        f"1. Walk: {WALK}.\n2. Rest: the previous step made you tired, so {REST}.\n",
        f"1. Walk: {WALK}.\n2. Rest: with the advice above in mind, {REST}.\n"],
    "opens with a pronoun for a sibling": [
        f"- Foxes have learnt to {WALK} near towns.\n- They are shy animals that {REST}.\n"],
    "steps without names": [
        f"Follow these steps:\n\n1. Open the box and {WALK}\n2. Lift the lid and {REST}\n3. Turn the key and {FOOD}\n",
        f"You can use the following approach:\n\n1. Open the box and {WALK}\n2. Lift the lid and {REST}\n",
        f"Here is how you can do it:\n\n1. Open the box and {WALK}\n2. Lift the lid and {REST}\n"],
    "uses a value worked out in a sibling": [
        f"1. Area: the room is 4 m by 6 m, which gives = 24 square metres, {WALK}.\n"
        f"2. Paint: 24 square metres need three tins, {REST}.\n",
        f"1. Shirts: two at 15 each are 2 * 15 = 30, {WALK}.\n2. In all: with shoes 30 + 40 = 70, {REST}.\n"],
    "uses a name of a sibling": [
        f"1. Read the file, and {WALK}:\n```\nrows = load('a.csv')\n```\n"
        f"2. Count it, and {REST}:\n```\nprint(len(rows))\n```\n",
        f"1. Page: open it, and {WALK}:\n```\n<p id='day-list'>\n```\n"
        f"2. Style: copy this, and {REST}:\n```\n#day-list {{ color: red }}\n```\n",
        f"1. Start: keep it as JobStartTime, and {WALK}.\n2. End: subtract JobStartTime, and {REST}.\n",
        f"1. Event: {{'title': 'Wedding'}}, and {WALK}.\n2. Guest: {{'event': 'Wedding'}}, and {REST}.\n",
        f"Name: Zlorg\n\nLooks: {WALK}, as every Zlorg does.\n\nHome: {REST}.\n",
        f"1. Table: store the `user_name`, and {WALK}.\n2. Form: ask for the `user_name`, and {REST}.\n"],
    "takes up a thing of a sibling": [
        f"1. Plant: dig a hole, build a fence, then {WALK}.\n2. Care: water the hole, paint the fence, then {REST}.\n"],
    "goes on with a sibling's story": [
        f"Day 1: Landing\nWe met Marta, Pedro, Lucia and Bruno at the port to {WALK}.\n\n"
        f"Day 2: Hills\nAt dawn Marta and Pedro left, while Lucia and Bruno chose to {REST}.\n",
        f"Page 1:\nWe see how Marta, Pedro, Lucia and Bruno {WALK}.\n\n"
        f"Page 2:\nAs Marta and Pedro look on, Lucia and Bruno {REST}.\n"],
    "saves no steps": ["1. Ash\n2. Elm\n3. Oak\n", "- Yes, of course.\n- No.\n"],
}
CASES = [(reason, answer) for reason, answers in REFUSED.items() for answer in answers]


@pytest.mark.parametrize("reason, answer", CASES, ids=[f"{r}-{i}" for i, (r, _) in enumerate(CASES)])
def test_dependent_parts_stay_serial_and_the_reason_is_given(reason, answer):
    assert blocks(answer) == [] and reason in reasons(answer)


ALLOWED = {  # what a branch may rely on: nearly the same answers as some that are refused
    "what the text before says": f"Foxes are shy.\n\n- They often {WALK}.\n- They usually {REST}.\n",
    "a value in the question": (f"1. Floor: the room has 4 x 6 = 24 square metres, {WALK}.\n"
        f"2. Paint: 24 square metres need three tins, {REST}.\n"),
    "what a title says": f"1. `shop.py`: add a file called `shop.py` and {WALK}.\n2. Test: run `shop.py` and {REST}.\n",
    "an item about results among others": f"1. Goal: {WALK}.\n2. Results: {REST}.\n3. Cost: {FOOD}.\n",
    "named steps": f"Follow these steps:\n\n1. Unpack: open the box and {WALK}\n2. Lift: take the lid off and {REST}\n",
    "dishes, each a recipe of its own": (f"1. Soup: simmer leeks for an hour, then {WALK}.\n"
        f"2. Stew: stir beans in a saucepan, then {REST}.\n"),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_a_branch_may_rely_on_the_question_the_lead_and_the_titles(name):
    assert len(blocks(ALLOWED[name], "How do I do the 24 square metres?")) == 1, reasons(ALLOWED[name])


def test_summary_below_a_section_is_serial():
    """A heading that sums its siblings up ends their block: it has to see them."""
    segments, _ = extract(f"## Cats\n\n{WALK}.\n\n## Dogs\n\n{REST}.\n\n## Summary\n\nBoth are fine.\n")
    assert len(segments[0]) == 2 and segments[1] == "## Summary\n\nBoth are fine.\n"


def test_refused_sections_may_hold_lists_that_are_independent():
    answer = (f"**Plan:**\n\nRent is = 940 euros.\n\n- Walk: {WALK}.\n- Rest: {REST}.\n\n"
              "**Money:**\n\nKeep 940 euros.\n\n"
              f"- Food: {FOOD}.\n- Books: borrow most of them from the library in the town that is next to you.\n")
    assert "uses a value worked out in a sibling" in reasons(answer)
    assert [len(block) for block in blocks(answer)] == [2, 2]
    assert not blocks(answer)[0][-1].text.endswith("\n\n")  # the blank line is the outer section's


# -----------------------------------------------------------------------------
# titles and costs

TITLES = {  # items, their titles
    "up to the colon": (["1. Sleep: a lot", "2. Move: a bit"], ["1. Sleep", "2. Move"]),
    "up to the end of the bold span": (["- **Sleep well** each night", "- **Move** daily"],
                                       ["- **Sleep well", "- **Move"]),
    "up to the dash": (["* Oslo - a port", "* Rome - a capital"], ["* Oslo", "* Rome"]),
    "fewest words that tell apart": (["1. Buy green apples", "2. Buy red cherries"], ["1. Buy green", "2. Buy red"]),
    "past a label that all items have": (["1. Need: sleep at night", "2. Need: a walk outside"],
                                         ["1. Need: sleep", "2. Need: a"]),
    "a long label is cut": (["1. Sleeping in a cold room: good", "2. Moving in the open air: good"],
                            ["1. Sleeping", "2. Moving"]),
}


@pytest.mark.parametrize("name", TITLES)
def test_title_is_the_label_or_the_fewest_words_that_tell_the_part_apart(name):
    items, titles = TITLES[name]
    [block] = blocks("".join(f"{item}, {body}.\n" for item, body in zip(items, [WALK, REST])))
    assert [b.title for b in block] == titles


def test_block_opens_only_where_it_saves_steps():
    """The longest branch is waited for, titles and tags are serial: one long part among short ones saves nothing."""
    item = "is a harbour town with an old market and a bridge"
    assert len(blocks(f"- Oslo: {item}.\n- Rome: {item}.\n- Bern: {item}.\n")) == 1
    assert blocks(f"- Oslo: {' '.join([item] * 30)}.\n- Rome: small.\n- Bern: quiet.\n") == []


# -----------------------------------------------------------------------------
# any text at all, in linear time

PIECES = ["1. ", "2) ", "- ", "* ", "**Bold:** ", "## ", "\n", "\n\n", "\r\n", "\t", "    ", "```\n", "|a|b|\n",
          "---\n", "Step 1: ", "Label:\n", "a. ", "ii. ", "(1) ", "一、", "早睡：", "<|branch|>", "<|/title|>", "the pan ",
          "a pan ", "However, ", "They are ", "= 12.5 ", "x = 3\n", "`x.py` ", "\u2028", "\x00", "\ud800", "🙂", "é",
          "First, ", "Summary\n", "word ", "٣. ", "²) "]


def test_nothing_is_lost_whatever_the_text():
    """Random Markdown rubble: joined segments are the text; titles are distinct, non-empty prefixes of branches."""
    rng = random.Random(0)
    for n in range(FUZZED):
        answer = "".join(rng.choices(PIECES, k=rng.randrange(60)))
        if n % 3 == 0:  # longer items, so that many texts hold a block
            answer = "".join(f"{rng.choice(['- ', f'{i}. '])}{i}{' '.join(rng.choices(PIECES, k=12))}\n"
                             for i in range(9))
        for block in blocks(answer, "".join(rng.choices(PIECES, k=3))):
            assert 2 <= len(block) <= 16 and len({b.title for b in block}) == len(block)
            assert all(b.title.strip() and b.text.startswith(b.title) for b in block), answer


STRESS = {"1. 1. 1.": "1. ", "items": "1. a thing of the town\n", "labels": "Aa: b\n\n", "stars": "* ",
          "blank lines": "\n", "headings": "# a\n", "code": "x = 33\n", "one word": "a", "fences": "```\n"}


@pytest.mark.parametrize("name", STRESS)
def test_time_grows_linearly(name):
    """Twice the text takes about twice the time (three times, and a little for the clock), the best of three runs."""
    def seconds(size):
        text, best = STRESS[name] * (size // len(STRESS[name])), 1e9
        for _ in range(3):
            start = time.process_time()
            extract(text)
            best = min(best, time.process_time() - start)
        return best
    assert seconds(200_000) < 3 * seconds(100_000) + 0.05


def test_a_megabyte_of_markers_takes_under_two_seconds():
    start = time.process_time()
    extract("1. " * 350_000)
    assert time.process_time() - start < 2
