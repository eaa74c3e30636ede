"""How hard the five files are to read, in numbers. A bar, so that code is written out and stays so.

Two statements on a line, a comprehension in another one, `a and b()` as a statement: each saves a
line and costs the reader a minute. The numbers of well-known teaching code are about the same.
"""
import ast
import io
import tokenize

import pytest

from conftest import ROOT

FILES = ["data.py", "vqgan3d.py", "diffusion.py", "sample.py", "evaluate.py"]
COLUMNS = 100                    # of a line, at most
TOKENS_PER_LINE = 11.0           # names, numbers, strings and signs a line of code, on average
SQUEEZED = 3                     # places a hundred lines of code, at most
TOKENS_PER_FUNCTION = 600        # at most

COMPREHENSIONS = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
           tokenize.ENDMARKER}

def read(name):
    return (ROOT / name).read_text()

def is_docstring(statement):
    """Is it a string that nothing is done with?"""
    return (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            and isinstance(statement.value.value, str))

def code_tokens(source):
    """The line number of each token of code: no comment, no docstring, no white space."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if is_docstring(node):
            docstrings.update(range(node.lineno, node.end_lineno + 1))
    lines, f_strings = [], 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line, _ = token.start
        kind = tokenize.tok_name[token.type]          # an f-string is one token, also in
        f_strings += kind == "FSTRING_START"          # Python 3.12, where it has several
        f_strings -= kind == "FSTRING_END"
        if not f_strings and token.type not in NO_CODE and line not in docstrings:
            lines.append(line)
    return lines

def contains(node, kinds):
    """Is there another node of these kinds inside?"""
    return any(isinstance(inner, kinds) for inner in ast.walk(node) if inner is not node)

def squeezed_places(source):
    """(line number, reason) of each place that says more than one thing at once."""
    places, statements = [], {}
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.stmt):
            if line in statements:
                places.append((line, "two statements on a line"))
            statements[line] = node
        if isinstance(node, ast.Expr):
            if isinstance(node.value, (ast.BoolOp, ast.IfExp, *COMPREHENSIONS)):
                places.append((line, "an expression used as a statement"))
        if isinstance(node, COMPREHENSIONS):
            if len(node.generators) > 1 or contains(node, COMPREHENSIONS):
                places.append((line, "two loops in a comprehension"))
        if isinstance(node, ast.IfExp) and contains(node, ast.IfExp):
            places.append((line, "a condition inside another"))
        if isinstance(node, ast.Assign):
            if isinstance(node.value, ast.Lambda):
                places.append((line, "a lambda with a name"))
            if isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple):
                if len(node.value.elts) > 2:
                    places.append((line, "three assignments at once"))
    return sorted(set(places))

def test_squeezed_places_are_found():
    """A measure that finds nothing: the bar below holds whatever is written."""
    squeezed = ("if x: y = 1", "x = 1; y = 2", "x and y()", "[f(v) for v in x]",
                "x = [[v for v in w] for w in x]", "x = [v for w in x for v in w]",
                "x = 1 if a else 2 if b else 3", "f = lambda x: x", "a, b, c = 1, 2, 3")
    for source in squeezed:
        assert len(squeezed_places(source)) == 1, source
    plain = '"""A module."""\nif x:\n    y = 1\nx, y = 1, 2\nf(v for v in x)\nx = 1 if a else 2\n'
    assert squeezed_places(plain) == []
    assert len(code_tokens(plain)) == 3 + 3 + 7 + 8 + 7

@pytest.mark.parametrize("name", FILES)
def test_lines_are_short_and_say_one_thing_each(name):
    """Code that was compressed to have fewer lines."""
    source = read(name)
    wide = [i for i, line in enumerate(source.splitlines(), 1) if len(line) > COLUMNS]
    assert not wide, f"lines over {COLUMNS} columns: {wide}"
    tokens = code_tokens(source)
    num_lines = len(set(tokens))
    assert len(tokens) / num_lines <= TOKENS_PER_LINE
    places = squeezed_places(source)
    assert len(places) <= SQUEEZED * num_lines / 100, places

@pytest.mark.parametrize("name", FILES)
def test_functions_fit_on_a_screen(name):
    """A function that does everything, with one part after the other."""
    source = read(name)
    tokens = code_tokens(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            size = sum(node.lineno <= line <= node.end_lineno for line in tokens)
            assert size <= TOKENS_PER_FUNCTION, f"{node.name} has {size} tokens"
