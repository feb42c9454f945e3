"""Knows which answers are allowed to a text, as a grammar that vLLM and transformers (xgrammar) both read.

The grammar is about characters, so it holds for any tokenizer.
"""

from __future__ import annotations

from biomerge_lib.core.prompt_format import find_pieces

CONSTRAINTS = ("off", "format", "offsets")
_FORMAT = """root ::= "" | " " span (" ; " span)*
span ::= number "-" number
number ::= "0" | [1-9] [0-9]{0,5}"""


def build_grammar(text: str, constraint: str) -> str | None:
    """The answers allowed to ``text`` in EBNF (xgrammar's GBNF), EOS left to the decoder; None for ``off``.

    ``format`` allows the empty answer and `` 0-7 ; 20-34`` with any numbers. ``offsets`` allows only spans that
    start and end where a word or a part of one does (``find_pieces``), in ascending order, without overlap: a
    chain in which ``from_3`` is any span that starts at piece 3 or later and ``to_3`` any end at piece 3 or later,
    so that its size grows linearly with the text.

    >>> print(build_grammar("Aspirin can", "offsets"))
    root ::= "" | " " from_0
    from_0 ::= "0-" to_0 | from_1
    to_0 ::= "7" next_1 | to_1
    next_1 ::= "" | " ; " from_1
    from_1 ::= "8-" to_1
    to_1 ::= "11"
    """
    if constraint == "off":
        return None
    if constraint == "format":
        return _FORMAT
    pieces = find_pieces(text)
    if not pieces:
        return 'root ::= ""'
    rules = ['root ::= "" | " " from_0']
    for index, (start, end) in enumerate(pieces[:-1]):
        after = index + 1
        rules += [
            f'from_{index} ::= "{start}-" to_{index} | from_{after}',
            f'to_{index} ::= "{end}" next_{after} | to_{after}',
            f'next_{after} ::= "" | " ; " from_{after}',
        ]
    (start, end), last = pieces[-1], len(pieces) - 1
    return "\n".join([*rules, f'from_{last} ::= "{start}-" to_{last}', f'to_{last} ::= "{end}"'])
