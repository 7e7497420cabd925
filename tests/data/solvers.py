# SPDX-License-Identifier: Apache-2.0
"""Exact simulators and trivial guesses for the entity-tracking tasks, written apart from the package's generators.

They read the rows as a model does: words of a prompt, or token ids through the words of a vocabulary.
"""

import itertools


FIRST_WORD = 4


# boxes


def boxes_after(text):
    """Contents of every box, found word by word."""
    words = text.replace(",", " ,").replace(".", " .").split()
    contents, sentence = {}, []
    for word in words:
        if word not in (".", ","):
            sentence.append(word)
            continue
        act(contents, sentence)
        sentence = []
    return contents


def act(contents, words):
    boxes = [int(words[place + 1]) for place, word in enumerate(words) if word == "Box"]
    named = {words[place + 1] for place, word in enumerate(words) if word == "the"} - {"contents"}
    if words[0] == "Box":
        contents[boxes[0]] = named
    elif words[0] == "Put":
        contents[boxes[0]] = contents[boxes[0]] | named
    else:
        taken = contents[boxes[0]] if words[1:3] == ["the", "contents"] else named
        assert taken <= contents[boxes[0]]
        contents[boxes[0]] = contents[boxes[0]] - taken
        if words[0] == "Move":
            contents[boxes[1]] = contents[boxes[1]] | taken


def said(names):
    return "contains " + " and ".join(f"the {name}" for name in sorted(names)) if names else "is empty"


def split_question(prompt):
    text, _, box = prompt.rpartition(" Box ")
    return text, int(box)


def boxes_answer(prompt):
    text, box = split_question(prompt)
    return said(boxes_after(text)[box])


def boxes_depths(prompt):
    """(numops, num_moves, implicit_hops) of a question, from the sentences that say something of its objects."""
    text, box = split_question(prompt)
    description, *sentences = [
        sentence.split() for sentence in text.replace(".", " .").split(" .") if sentence.strip()
    ]
    numops = sum(("Box", str(box)) in itertools.pairwise(words) for words in sentences)
    contents = boxes_after(" ".join(description) + ".")
    # of every object: what happened to it, in order
    history = {}
    for words in sentences:
        before = {name: where for where, names in contents.items() for name in names}
        act(contents, words)
        after = {name: where for where, names in contents.items() for name in names}
        for name, where in after.items():
            if before.get(name) != where:
                history.setdefault(name, []).append((words[0], name in words))
    moves, hops = [-1], [-1]
    for name in contents[box]:
        told = history.get(name, [])
        last_put = max((place for place, (verb, _) in enumerate(told) if verb == "Put"), default=-1)
        last_named = max((place for place, (_, named) in enumerate(told) if named), default=-1)
        moves.append(len(told) - 1 - last_put)
        hops.append(len(told) - 1 - last_named)
    return numops, max(moves), max(hops)


def guess_initial(prompt):
    """What the box contained at the start."""
    text, box = split_question(prompt)
    return said(boxes_after(text.split(".")[0] + ".")[box])


def guess_last_sentence(prompt):
    """What the last sentence on the box names, if it fills the box; nothing if it empties it."""
    text, box = split_question(prompt)
    for sentence in reversed(text.split(".")):
        for clause in reversed(sentence.split(",")):
            words = clause.split()
            boxes = [int(words[place + 1]) for place, word in enumerate(words) if word == "Box"]
            if box in boxes:
                named = {words[place + 1] for place, word in enumerate(words) if word == "the"} - {"contents"}
                return said(named if boxes[-1] == box and words[0] != "Remove" else set())
    raise AssertionError(prompt)


def guess_last_named(prompt):
    """The objects whose last mention puts them into the box."""
    text, box = split_question(prompt)
    place = {}
    for sentence in text.split("."):
        for clause in sentence.split(","):
            words = clause.split()
            boxes = [int(words[index + 1]) for index, word in enumerate(words) if word == "Box"]
            for index, word in enumerate(words):
                if word == "the" and words[index + 1] != "contents":
                    place[words[index + 1]] = None if words[0] == "Remove" else boxes[-1]
    return said({name for name, where in place.items() if where == box})


# chains


def chain_value(prompt):
    """The literal at the end of a walk back from the question."""
    *statements, question = prompt.split(" ; ")
    source = {}
    for statement in statements:
        read, _, written = statement.split()
        assert written not in source
        source[written] = read
    name, hops = question.split()[0], -1
    while name.startswith("v"):
        name, hops = source[name], hops + 1
    return name, hops


def statements_of(row, vocabulary):
    """[(written, read, literal), ...] as words, without <bos> and <eos>."""
    return [tuple(vocabulary[word - FIRST_WORD] for word in ids) for ids in row["statement_ids"][1:-1]]


def chain_values(statements):
    """[(value, hops), ...] after every statement."""
    found = {}
    for written, read, literal in statements:
        assert (read == "none") != (literal == "none")
        name = written.removeprefix("w")
        assert name not in found
        value, hops = (literal, -1) if read == "none" else found[read.removeprefix("r")]
        found[name] = (value, hops + 1)
    return list(found.values())


# permutations


def arrange(moves):
    """The arrangement after moves written as words, element by element."""
    state = "".join(sorted(moves[0]))
    for move in moves:
        state = "".join(state[int(place)] for place in move)
    return state
