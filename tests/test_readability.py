"""How hard the five files are to read, in numbers. A bar, so that code is written out and stays so.

Size is counted in tokens. The way to fewer is to delete what nobody needs, never to squeeze: two
statements on a line, a comprehension in another one, `a and b()` as a statement each save a line
and cost the reader a minute.
"""
import ast
import io
import tokenize

import pytest

from conftest import ROOT

TOTAL = 21_000                   # tokens of the five files together, at most
TOKENS = {                       # of each, with room to move
    "data.py": 5_400,            # aim: 5,200
    "vqgan3d.py": 5_450,
    "diffusion.py": 5_900,
    "sample.py": 1_500,
    "evaluate.py": 3_100,
}
TOKENS_PER_LINE = 10.0           # names, numbers, strings and signs a line of code, on average
TOKENS_PER_FUNCTION = 450        # at most, but of these:
LONGER = {"main": 1_000,         # with the training loop, in view
          "UNet.__init__": 560}
COLUMNS = 100                    # of a line, at most
SQUEEZED = 3                     # places a hundred lines of code, at most
RAISE_AND_ASSERT = 45            # in the five files together, at most
LINES = {"tests/*.py": 2_600, "tests/experiments/README.md": 500, "README.md": 200}    # at most
README_BYTES = 13_000            # at most

COMPREHENSIONS = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
           tokenize.ENDMARKER}

def read(name):
    return (ROOT / name).read_text()

def code_tokens(source):
    """The line number of each token of code: no comment, no docstring, no white space."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
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

def functions(source):
    """Yield (name, number of tokens); of a method Class.name"""
    tokens = code_tokens(source)
    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            name = prefix + getattr(child, "name", "") if isinstance(child, ast.stmt) else prefix
            if isinstance(child, ast.FunctionDef):
                yield name, sum(child.lineno <= line <= child.end_lineno for line in tokens)
            yield from visit(child, f"{name}." if name != prefix else prefix)
    return visit(ast.parse(source), "")

def squeezed_places(source):
    """(line number, reason) of each place that says more than one thing at once."""
    places, statements = [], set()
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        inside = [inner for inner in ast.walk(node) if inner is not node]
        if isinstance(node, ast.stmt):
            if line in statements:
                places.append((line, "two statements on a line"))
            statements.add(line)
        if isinstance(node, ast.Expr):
            if isinstance(node.value, (ast.BoolOp, ast.IfExp, *COMPREHENSIONS)):
                places.append((line, "an expression used as a statement"))
        if isinstance(node, COMPREHENSIONS):
            if len(node.generators) > 1 or any(isinstance(i, COMPREHENSIONS) for i in inside):
                places.append((line, "two loops in a comprehension"))
        if isinstance(node, ast.IfExp) and any(isinstance(i, ast.IfExp) for i in inside):
            places.append((line, "a condition inside another"))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            places.append((line, "a lambda with a name"))
    return sorted(set(places))

def test_the_measures_measure():
    """A measure that finds nothing: the bar below holds whatever is written."""
    squeezed = ("if x: y = 1", "x = 1; y = 2", "x and y()", "[f(v) for v in x]",
                "x = [[v for v in w] for w in x]", "x = [v for w in x for v in w]",
                "x = 1 if a else 2 if b else 3", "f = lambda x: x")
    for source in squeezed:
        assert len(squeezed_places(source)) == 1, source
    plain = '"""A module."""\nif x:\n    y = 1\nx, y = 1, 2\nf(v for v in x)\nx = 1 if a else 2\n'
    assert squeezed_places(plain) == []
    assert len(code_tokens(plain)) == 3 + 3 + 7 + 8 + 7
    nested = "class A:\n    def f(self):\n        return 1\ndef g():\n    pass\n"
    assert [*functions(nested)] == [("A.f", 8), ("g", 6)]

@pytest.mark.parametrize("name", TOKENS)
def test_a_file_is_short(name):
    """Features that nobody misses, kept because each is small; two columns on a screen."""
    source = read(name)
    tokens = code_tokens(source)
    assert len(tokens) <= TOKENS[name]
    wide = [i for i, line in enumerate(source.splitlines(), 1) if len(line) > COLUMNS]
    assert not wide, f"lines over {COLUMNS} columns: {wide}"
    places = squeezed_places(source)
    assert len(places) <= SQUEEZED * len(set(tokens)) / 100, places

@pytest.mark.parametrize("name", TOKENS)
def test_functions_fit_on_a_screen(name):
    """A function that does everything, with one part after the other."""
    for function, size in functions(read(name)):
        limit = LONGER.get(function, TOKENS_PER_FUNCTION)
        assert size <= limit, f"{function} has {size} tokens"

def test_the_five_files_together():
    """Five files that are short one by one: more than a student holds in the head after an evening;
    a third of the lines refuses what a traceback says as well."""
    tokens = {name: code_tokens(read(name)) for name in TOKENS}
    total = sum(map(len, tokens.values()))
    num_lines = sum(len(set(lines)) for lines in tokens.values())
    assert total <= TOTAL
    assert total / num_lines <= TOKENS_PER_LINE
    nodes = [node for name in TOKENS for node in ast.walk(ast.parse(read(name)))]
    assert sum(isinstance(node, (ast.Raise, ast.Assert)) for node in nodes) <= RAISE_AND_ASSERT

@pytest.mark.parametrize("pattern", LINES)
def test_what_stands_beside_the_code_is_short(pattern):
    """Tests, notes and a README that grow with every round, whatever the code does."""
    texts = [path.read_text() for path in ROOT.glob(pattern)]
    assert texts
    assert sum(len(text.splitlines()) for text in texts) <= LINES[pattern]

def test_the_readme_is_short():
    """The same in bytes: lines that grow."""
    assert len((ROOT / "README.md").read_bytes()) <= README_BYTES
