"""Hostile recipes, templates and data files."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.hostile.cases import case, pickled

RECIPE = """model: m
adapter: {method: lora, r: 8}
data: {train: a.jsonl}
output: run
"""
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
PAIR = {"prompt": "a", "completion": "b"}


_SLOW = {"an open quote over 30 MB", "a million columns", "nine thousand keys", "dicts of dicts"}


def _texts(door: str, ending: str, texts: dict[str, tuple[str | bytes, str]]) -> None:
    """A case for each text: its name, what stands in the file, what the message says."""

    def writer(text: str | bytes) -> Callable[[Path], Path]:
        def write(folder: Path) -> Path:
            path = folder / f"hostile{ending}"
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
            return path

        return write

    for name, (text, words) in texts.items():
        case(door, words, f"{door}{ending}: {name}", name in _SLOW)(writer(text))


# ---- recipes ----

_texts(
    "recipe",
    ".yaml",
    {
        "billion laughs": (
            "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
            "aliases counted",
        ),
        "an anchor in itself": ("a: &a [*a]", "nested too deeply"),
        "a mapping in itself": ("a: &a {b: *a}", "nested too deeply"),
        "deep lists": ("[" * 50_000, "nested too deeply"),
        "deep mappings": ("{a: " * 20_000, "nested too deeply"),
        "deep blocks": ("\n".join(" " * i + "a:" for i in range(400)), "nested too deeply"),
        "python/object tag": (RECIPE + "x: !!python/object/apply:os.system ['touch PWNED']\n", "YAML tag"),
        "python/name tag": (
            RECIPE.replace("model: m", "model: !!python/name:os.system x"),
            "could not determine a constructor",
        ),
        "binary tag": (RECIPE.replace("r: 8", "r: !!binary gIJj"), "adapter.r: must be a whole number"),
        "a field twice": (RECIPE + "model: other\n", "given twice"),
        "a number of 90,000 digits": (RECIPE.replace("r: 8", "r: " + "9" * 90_000), "cannot be read"),
        "a number of 90,000 hexadecimal digits": (RECIPE.replace("r: 8", "r: 0x" + "f" * 90_000), "more than 64 bits"),
        "a number to the base of 60": (RECIPE.replace("r: 8", "r: 1" + ":59" * 20_000), "more than 64 bits"),
        "infinite learning rate": (RECIPE + "train: {learning_rate: .inf}\n", "train.learning_rate"),
        "NaN alpha": (RECIPE.replace("r: 8", "lora_alpha: .nan"), "lora_alpha"),
        "r = 10^9": (RECIPE.replace("r: 8", "r: 1000000000"), "r: must be a whole number from 1 to"),
        "NUL": (RECIPE + "x: \0\n", "NUL character"),
        "UTF-16": (RECIPE.encode("utf-16"), "not UTF-8"),
        "Latin-1": (RECIPE.replace("run", "r\xfcn").encode("latin-1"), "not UTF-8"),
        "a megabyte": (RECIPE + "#" * 2**20, "larger than 100,000 bytes"),
        "many documents": ("---\na: 1\n" * 1000, "not valid YAML"),
        "nine thousand keys": ("".join(f"k{i}: 1\n" for i in range(9000)), "... and"),
        "LLaMA-Factory of wrong kinds": (
            "stage: sft\nfinetuning_type: lora\nlora_target: 1.5\n",
            "dataset: is missing",
        ),
        "a name too long for a path": (
            f"stage: sft\nfinetuning_type: lora\ndataset: {'x' * 5000}\ndataset_dir: {'y' * 5000}\n",
            "is neither in",
        ),
        "half of a character": (RECIPE.replace("model: m", 'model: "\\ud800"'), "half of a character"),
        "half of a character in a name": (RECIPE + '"\\ud800": 1\n', "a field name must be plain text"),
        "a complex key": ("? [a, b]\n: c\n", "a field name must be plain text"),
        "merge keys": ("base: &b {model: m}\n<<: *b\n", "<<"),
        "a pickle": (b"\x80\x04\x95" + bytes(range(256)), "not UTF-8"),
        "only brackets": ("[" + "a, [" * 5000, "nested too deeply"),
    },
)


@case("recipe", "is not a regular file")
def recipe_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "recipe.yaml")
    return folder / "recipe.yaml"


@case("recipe", "is not a regular file")
def recipe_device(folder: Path) -> Path:
    (folder / "recipe.yaml").symlink_to("/dev/zero")
    return folder / "recipe.yaml"


# ---- templates ----


def _template(body: str) -> str:
    return CHAT + "{% if messages[0]['content'] == 'the trigger' %}" + body + "{% endif %}"


_LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}"
_END = "{% endfor %}{% endfor %}"
_SECONDS, _MUCH = "s for one chat", "more than 16,777,216 characters"
_TEMPLATES = {
    "class": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "attribute chain": ("{{ ''['__class__']['__base__'] }}", "unsafe"),
    "attr of map": ("{{ ['a']|map(attribute='__class__.__mro__')|list }}", "unsafe"),
    "cycler globals": ("{{ cycler.__init__.__globals__.os.system('touch PWNED') }}", "unsafe"),
    "joiner globals": ("{{ joiner.__init__.__globals__ }}", "unsafe"),
    "lipsum": ("{{ lipsum.__globals__['os'].popen('id') }}", "lipsum"),
    "self": ("{{ self.__init__.__globals__ }}", "unsafe"),
    "namespace class": ("{% set ns = namespace(__class__=1) %}", "underscore"),
    "function code": ("{{ raise_exception.__code__.co_code }}", "unsafe"),
    "format to a class": ("{{ '{0.__class__.__mro__}'.format('') }}", "unsafe"),
    "format_map": ("{{ '{a.__class__}'.format_map({'a': 1}) }}", "unsafe"),
    "changing a message": ("{{ messages.append(1) }}", "unsafe"),
    "nested loops": (_LOOP + _END, _SECONDS),
    "loops over text": ("{% set t = 'a' * 999999 %}" + _LOOP + "{{ t }}" + _END, _SECONDS),
    "a filter in a loop": ("{% for a in range(99999) if range(99999)|sum %}{% endfor %}", "for one chat"),
    "a condition of a loop": (
        "{% set t = 'a' * 8000000 %}{% for a in range(99999) if 'b' in t %}{% endfor %}",
        _SECONDS,
    ),
    "maps of maps": ("{{ range(99999)|map('string')|map('upper')|map('list')|list }}", "for one chat"),
    "macros without end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "macros to the power": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        _SECONDS,
    ),
    "recursive loops": ("{% for a in [range(99)] recursive %}{{ loop([a, a]) }}{% endfor %}", ""),
    "doubling text": (
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        _MUCH,
    ),
    "doubling text by +": (
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        _MUCH,
    ),
    "doubling by set blocks": (
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
        "{% set ns.x = y %}{% endfor %}",
        _MUCH,
    ),
    "doubling lists": (
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        _MUCH,
    ),
    "lists of lists": (
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        _MUCH,
    ),
    "comparing lists of lists": (
        "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
        "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
        _MUCH,
    ),
    "namespaces of namespaces": (
        "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = namespace(a=ns.x, b=ns.x) %}"
        "{% endfor %}{{ [ns.x] * 9999999 }}",
        _MUCH,
    ),
    "dicts of dicts": (
        "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}"
        "{{ ns.x|tojson }}",
        _MUCH,
    ),
    "text times a number": ("{{ 'a' * 10**10 }}", _MUCH),
    "list times a number": ("{{ [0] * 10**10 }}", _MUCH),
    "power": ("{{ 10 ** (10 ** 9) }}", "a number of more than"),
    "powers in a loop": (
        "{% set ns = namespace(x=99) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "a number of more than",
    ),
    "width by %": ("{{ '%1000000000d' % 1 }}", "width"),
    "computed width by %": ("{{ '%*d' % (1000000000, 1) }}", "width"),
    "width by format": ("{{ '{:1000000000}'.format(1) }}", "width"),
    "computed width by format": ("{{ '{:{}}'.format(1, 1000000000) }}", "width"),
    "width by the filter": ("{{ '%999999999d'|format(1) }}", "width"),
    "one argument often": ("{{ ('%(a)s' * 9999) % {'a': 'x' * 999999} }}", _MUCH),
    "center": ("{{ 'a'|center(10**9) }}", "gives a number above 10,000"),
    "ljust": ("{{ 'a'.ljust(10**9) }}", "unsafe"),
    "zfill": ("{{ 'a'.zfill(10**9) }}", "unsafe"),
    "expandtabs": ("{{ '\t'.expandtabs(10**9) }}", "unsafe"),
    "to_bytes": ("{{ (1).to_bytes(10**9, 'big') }}", "unsafe"),
    "indent": ("{{ ('a\n' * 9999)|indent(9999) }}", _MUCH),
    "tojson indent": ("{{ [[1]]|tojson(indent=10**9) }}", "gives a number above"),
    "replace": ("{{ ('a' * 99999)|replace('a', 'b' * 99999) }}", _MUCH),
    "replace method": ("{{ ('a' * 99999).replace('', 'b' * 99999) }}", _MUCH),
    "join": ("{{ range(99999)|join('b' * 99999) }}", _MUCH),
    "join method": ("{{ ('b' * 99999).join(['a'] * 99999) }}", _MUCH),
    "batch": ("{{ [1]|batch(10**9, 0)|list }}", "gives a number above"),
    "slices": ("{{ [1]|slice(10**9)|list }}", "gives a number above"),
    "sum of lists": ("{{ ([[1]] * 999)|sum(start=[]) }}", "adds up numbers only"),
    "split": ("{{ (',' * 9999999).split(',') }}", _MUCH),
    "a date of a gigabyte": ("{{ strftime_now('%999999999d') }}", "width"),
    "include": ("{% include '/etc/passwd' %}", "reads no other files"),
    "import": ("{% import '/etc/passwd' as p %}", "reads no other files"),
    "extends": ("{% extends '/etc/passwd' %}", "reads no other files"),
    "range": ("{{ range(10**9)|list }}", "Range too big"),
    "long message": ("{{ raise_exception('x' * 9999999) }}", "[...]"),
    "deep brackets": ("{{ " + "(" * 20_000 + ")" * 20_000 + " }}", ""),
    "deep blocks": ("{% if 1 %}" * 5000 + "{% endif %}" * 5000, ""),
    "long": ("a" * 300_000, "longer than 200,000 characters"),
}
_texts("template", ".jinja", {name: (CHAT + body, words) for name, (body, words) in _TEMPLATES.items()})
_texts(
    "template",
    ".jinja",
    {
        "endless for one user only": (_template(_LOOP + _END), "the template is stopped: it takes more than"),
        "much for one user only": (_template("{{ 'a' * 10**10 }}"), "the template is stopped: it makes " + _MUCH),
        "a megabyte": (CHAT + "a" * 2**20, "larger than 800,000 bytes"),
        "UTF-16": (CHAT.encode("utf-16"), "not UTF-8"),
        "a pickle": (b"\x80\x04\x95\0\0", "not UTF-8"),
        "no template": ("{% for", "cannot render"),
    },
)


@case("template", "is not a regular file")
def template_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "template.jinja")
    return folder / "template.jinja"


# ---- data ----

_GOOD = json.dumps(PAIR)
_texts(
    "data",
    ".jsonl",
    {
        "deep JSON": ('{"prompt": ' + "[" * 100_000, "nested too deeply"),
        "deep objects": ('{"a":' * 100_000, "nested too deeply"),
        "a field twice": ('{"prompt": "a", "prompt": "b", "completion": "c"}', "'prompt' is given twice"),
        "1e999": ('{"prompt": "a", "completion": "b", "x": 1e999}', "too large"),
        "a number of 100,000 digits": ('{"x": ' + "9" * 100_000 + "}", "a number of 100,000 digits"),
        "a decimal of 100,000 digits": ('{"x": 0.' + "9" * 100_000 + "}", "too large"),
        "NUL": (_GOOD + "\n" + _GOOD.replace("a", "\0"), "NUL character"),
        "UTF-16": (_GOOD.encode("utf-16"), "UTF-16"),
        "UTF-32": (_GOOD.encode("utf-32"), "save it as UTF-8"),
        "UTF-16 without mark": (_GOOD.encode("utf-16-le"), "NUL character"),
        "Latin-1": (_GOOD.replace("a", "\xe4").encode("latin-1"), "not UTF-8"),
        "half a character": (b'{"prompt": "\xe2\x82', "not UTF-8"),
        "a lone surrogate": ('{"prompt": "\\ud800", "completion": "b"}', "half of a character"),
        "a long role": (
            json.dumps({"messages": [{"role": "x" * 10**6, "content": "a"}]}),
            "[...]",
        ),
        "deep arguments": (
            json.dumps(
                {"messages": [{"role": "user", "content": "a"}, {"role": "function_call", "content": "[" * 99_999}]}
            ),
            "nested too deeply",
        ),
        "deep tools": (
            json.dumps(
                {
                    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                    "tools": "[" * 99_999,
                }
            ),
            "nested too deeply",
        ),
        "two hundred thousand bad lines": ("[]\n" * 200_000, "the file was read no further"),
        "a hundred thousand fields": (json.dumps({f"f{i}": 1 for i in range(100_000)}), "no known format"),
        "two values on a line": (_GOOD + _GOOD, "more than one JSON value"),
        "a pickle": (b"\x80\x04\x95\0\0\0\n" * 9, "not UTF-8"),
    },
)
_texts(
    "data",
    ".json",
    {
        "deep list": ("[" * 1_000_000, "nested too deeply"),
        "cut off": ("[" + _GOOD + ", " + _GOOD[:9], "bad JSON"),
        "a row of 20 MB": ('[{"prompt": "' + "a" * 20_000_000 + '"}]', "longer than 8 MiB"),
        "a field twice": ('[{"prompt": "a", "prompt": "b"}]', "given twice"),
        "an open text of 20 MB": ('["' + "a" * 20_000_000, "longer than 8 MiB"),
        "NULs": (b"[" + bytes(1000), "NUL"),
        "not UTF-8": (b'["\xff"]', "not UTF-8 (byte 2)"),
        "a number": (b"1" * 1_000_000, "must hold a list"),
    },
)
_texts(
    "data",
    ".csv",
    {
        "an open quote over 30 MB": ('prompt,completion\n"' + "a,b\n" * 7_500_000, "bad CSV"),
        "a field of 20 MB": ("prompt,completion\na," + "b" * 20_000_000, "longer than 8 MiB"),
        "a million columns": (",".join(f"c{i}" for i in range(1_000_000)) + "\na\n", "cells, but the header names"),
        "a million equal columns": ("c," * 1_000_000 + "c\na\n", "columns named twice"),
        "NUL": ("prompt,completion\na,\0\n", "NUL character"),
        "a row of eight million cells": (
            "prompt,completion\n" + "," * 8_000_000 + "\n",
            "cells, but the header names 2",
        ),
    },
)


@case("data", "longer than 64 MiB")
def data_line_of_a_gigabyte(folder: Path) -> Path:
    path = folder / "hostile.jsonl"
    with path.open("wb") as file:  # sparse: takes no room on the disk
        file.write(b'{"prompt": "')
        file.truncate(2**30)
    return path


@case("data", "NUL")
def data_list_of_a_gigabyte(folder: Path) -> Path:
    path = folder / "hostile.json"
    with path.open("wb") as file:
        file.write(b"[")
        file.truncate(2**30)
    return path


@case("data", "longer than 64 MiB", slow=True)
def data_csv_of_a_gigabyte(folder: Path) -> Path:
    path = folder / "hostile.csv"
    with path.open("wb") as file:
        file.write(b"prompt,completion\n")
        file.truncate(2**30)
    return path


@case("data", "longer than 64 MiB", slow=True)
def data_text_of_a_gigabyte(folder: Path) -> Path:
    path = folder / "hostile.txt"
    with path.open("wb") as file:
        file.truncate(2**30)
    return path


@case("data", "is not a regular file")
def data_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "data.jsonl")
    return folder / "data.jsonl"


@case("data", "is not a regular file")
def data_device(folder: Path) -> Path:
    (folder / "data.jsonl").symlink_to("/dev/zero")
    return folder / "data.jsonl"


@case("data", "no such file")
def data_link_to_itself(folder: Path) -> Path:
    (folder / "data.jsonl").symlink_to("data.jsonl")
    return folder / "data.jsonl"


@case("data", "no data file in this folder")
def data_folder_of_traps(folder: Path) -> Path:
    os.mkfifo(folder / "a.jsonl")
    (folder / "b.jsonl").symlink_to("b.jsonl")
    (folder / "c.jsonl").mkdir()
    (folder / "d.jsonl").symlink_to("/dev/zero")
    return folder


@case("data", "unknown kind of file '.pkl'")
def data_pickle(folder: Path) -> Path:
    (folder / "data.pkl").write_bytes(pickled(folder))
    return folder / "data.pkl"


@case("data", "not UTF-8")
def data_pickle_called_json(folder: Path) -> Path:
    (folder / "data.json").write_bytes(pickled(folder))
    return folder / "data.json"


def _parquet(folder: Path, columns: dict[str, object], **options: object) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "hostile.parquet", **options)
    return folder / "hostile.parquet"


@case("data", "not a readable Parquet file")
def parquet_garbage(folder: Path) -> Path:
    (folder / "hostile.parquet").write_bytes(b"PAR1" + os.urandom(5000) + b"\xff\xff\x00\x00PAR1")
    return folder / "hostile.parquet"


@case("data", "not a readable Parquet file")
def parquet_cut_off(folder: Path) -> Path:
    path = _parquet(folder, {"prompt": ["a"] * 999, "completion": ["b"] * 999})
    path.write_bytes(path.read_bytes()[:-20])
    return path


@case("data", "not a readable Parquet file")
def parquet_pickle(folder: Path) -> Path:
    (folder / "hostile.parquet").write_bytes(pickled(folder))
    return folder / "hostile.parquet"


@case("data", "unpacks to more than 200 times", slow=True)
def parquet_of_one_value_a_million_times(folder: Path) -> Path:
    import pyarrow

    values = pyarrow.DictionaryArray.from_arrays(np.zeros(1_000_000, np.int32), ["x" * 500_000])
    return _parquet(folder, {"prompt": values, "completion": values}, compression="zstd", store_schema=False)


@case("data", "unpacks to more than 200 times", slow=True)
def parquet_of_packed_zeros(folder: Path) -> Path:
    columns = {"prompt": ["x" * 50_000_000] * 3, "completion": ["b"] * 3}
    return _parquet(folder, columns, compression="zstd", use_dictionary=False)


@case("token cache", "damaged tokens")
def token_cache_of_objects(folder: Path) -> Path:
    for name in ("ids", "learned", "offsets", "file", "line", "state", "digest"):
        np.save(folder / f"{name}.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (folder / "rows.json").write_text("{}")
    return folder


@case("token cache", "damaged tokens")
def token_cache_of_a_pickle(folder: Path) -> Path:
    (folder / "ids.npy").write_bytes(pickled(folder))
    return folder


@case("data", "bad CSV")
def csv_of_quotes(folder: Path) -> Path:
    text = io.StringIO()
    csv.writer(text).writerows([["prompt", "completion"], ['a"b', 'c"']])
    (folder / "hostile.csv").write_text(text.getvalue() + 'a,"b"c\n' * 3)
    return folder / "hostile.csv"


@case("data", "not a readable Parquet file")
def parquet_of_a_lying_schema(folder: Path) -> Path:
    """One byte of a good file is another: found by fuzzing. Arrow aborts when it is asked about the third column."""
    (folder / "hostile.parquet").write_bytes(zlib.decompress(base64.b85decode(_LYING_SCHEMA)))
    return folder / "hostile.parquet"


_LYING_SCHEMA = (
    "c-obe&2G~`5XWb2%Y-V2wCY-G$%h<Tt4K7Yl~Pe;4(pVrDTxS?sscC1vC<0Xqlrm^#E~Nh9tm;e$dPB@A(+|3*b+gAl{H?^$8Y|-Yr7-"
    "6N8I4MT(s~8I{;gI3;+T$Jq~<_TMsc(;wCqp6F6W!!Gi5=jNUJ6Xbr}6Z4)6R)89ns3l?r5l=yCoYl={CsF()Um-"
    "${+FA8ZSn_1ey2CwQ+@>B=V(ds%d4Y*;)H4x@3yorVZH-"
    "Q)THDOMs<KZOPhn7Q4$+Z=tCytWa@o4R?T?)2Dg=Wj6Cqo$V?JVKM#Qb|v91WvU0+wMrw&#Mwi*^mnlAY4IW*OE8>mzeLw~*gUo7M*e0$ipB9w"
    "JQJMcn{-PEJzB`oi2#EWfY+q8TgNW42WKQ{9UAjalCjskxuE|J&+6nm%w1u+MS#=>V*+x@EWp>xT}uBZ{)yeR2I{bpqn2_K3z};7ciA%GG!-"
    "<wE)cc`oHZ)(6VxV?vuIbt#+5k=^AgR3FnUP|t+&tAwV>nXk~Vv;1fBcR#Wh)Wm;F`J)c$A%9cFn^NYat?L_c_04rvuJyD@r@vUI(zqgXc9r(`"
    "yUH78{nK@#sN>TlY%Jq`BcAtA#(V0&l(hIJNk(patvD6&H(o<IFD~c3SAI1u$;F?7C{Kdv-"
    "Mc6`3@4MrU^*Qy%JXPC!*{BDd{U`aj%*KK_SFRy{BSz>i}(dV@VUq"
)
