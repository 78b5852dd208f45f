"""Settings that change logits, and constrained decoding, with a model of random weights in the engine."""

import functools
import json
import re

import numpy as np
import pytest
from random_model import logits_of, random_model

from jaxchat.engine import Engine, Request
from jaxchat.engine.constraint import constrain, vocabulary
from jaxchat.engine.device import BANNED
from jaxchat.errors import UsageError

PROMPT = [0, 70, 81, 70]


@functools.cache
def engine():
    model = random_model("classic", depth=2)
    return Engine(model.config, model.params, model.tokenizer, slots=4)


def tokens(**settings):
    return engine().generate([Request(PROMPT, **{"max_tokens": 30, "tools": False} | settings)])[0].tokens


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.4},
        {"frequency_penalty": 0.8},
        {"presence_penalty": 1.5},
        {"frequency_penalty": -2.0},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2, "logit_bias": {70: 2.5, 8: -1}},
    ],
)
def test_greedy_answers_follow_the_formula(settings):
    """Token for token, against the training model's logits with the settings applied in numpy."""
    asked, made = Request([0], **settings), tokens(**settings)
    model = random_model("classic", depth=2)
    own = logits_of(model.config, model.params, np.array([PROMPT + made]))[0]
    for n, token in enumerate(made):
        z, answer = own[len(PROMPT) - 1 + n].copy(), made[:n]
        for i in {*PROMPT, *answer}:
            z[i] = z[i] / asked.repetition_penalty if z[i] > 0 else z[i] * asked.repetition_penalty
        for i in set(answer):
            z[i] -= asked.frequency_penalty * answer.count(i) + asked.presence_penalty
        for i, bias in asked.logit_bias.items():
            z[i] += bias
        assert z[token] >= z.max() - 1e-3
    assert len(made) == 30 and made != tokens()


def test_a_bias_bans_or_forces_a_token():
    likely = tokens()[0]
    for seed in range(4):
        assert likely not in tokens(logit_bias={likely: -100}, temperature=2.0, seed=seed)
        assert set(tokens(logit_bias={9: 100}, temperature=1.0, seed=seed)) == {9}
    everything = dict.fromkeys(range(293), -100.0)
    assert len(tokens(logit_bias=everything, temperature=1.0)) == 30  # no token is left: any, but no crash
    assert np.isfinite(np.float32(BANNED) * 2)
    for wrong in (-1, 293, 10**9):
        with pytest.raises(UsageError, match="logit_bias"):
            tokens(logit_bias={wrong: 1.0})


def test_log_probabilities_are_the_models_own():
    plain = engine().generate([Request(PROMPT, max_tokens=1, logprobs=0, tools=False)])[0].logprobs[0]
    forced = Request(PROMPT, max_tokens=1, logprobs=0, tools=False, logit_bias={plain.id: 50}, presence_penalty=2)
    assert engine().generate([forced])[0].logprobs[0].logprob == pytest.approx(plain.logprob, abs=1e-5)


def test_neither_an_end_nor_a_stop_text_before_min_tokens():
    free = tokens()
    first, text = free[0], engine().tokenizer.decode(free[3:4])
    assert tokens(stop=(first,)) == []
    held = tokens(stop=(first,), min_tokens=5)
    assert first not in held[:5] and len(held) >= 5
    early = engine().generate([Request(PROMPT, max_tokens=30, tools=False, stop_texts=(text,))])[0]
    late = engine().generate([Request(PROMPT, max_tokens=30, tools=False, stop_texts=(text,), min_tokens=9)])[0]
    assert len(early.tokens) <= 4 and len(late.tokens) > 9
    assert tokens(min_tokens=50, stop=(first,)) and len(tokens(min_tokens=50, stop=(first,))) == 30


def test_top_p_zero_is_the_likeliest_token():
    assert tokens(top_p=0.0, temperature=3.0, seed=1) == tokens()


SCHEMAS = [
    {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
     "required": ["name", "age"], "additionalProperties": False},
    {"type": "array", "items": {"enum": ["한국어", 1, None, True]}, "minItems": 2, "maxItems": 4},
    {"type": "object", "properties": {"in": {"$ref": "#/$defs/p"}}, "required": ["in"], "additionalProperties": False,
     "$defs": {"p": {"type": "object", "properties": {"x": {"type": "number"}, "b": {"type": "boolean"}},
                     "required": ["x", "b"], "additionalProperties": False}}},
    {"anyOf": [{"const": "예"}, {"type": "integer", "minimum": 3, "maximum": 12}]},
    {"type": "object"},
]  # fmt: skip


def valid(value, schema, root):
    """A JSON Schema validator for what `SCHEMAS` use."""
    if "$ref" in schema:
        return valid(value, root["$defs"][schema["$ref"].split("/")[-1]], root)
    if "anyOf" in schema:
        return any(valid(value, one, root) for one in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return any(value == one and type(value) is type(one) for one in schema.get("enum", [schema.get("const")]))
    kind = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    if not isinstance(value, kind[schema["type"]]) or (isinstance(value, bool) and schema["type"] != "boolean"):
        return False
    if isinstance(value, dict):
        known = schema.get("properties", {})
        closed = schema.get("additionalProperties", True) or set(value) <= set(known)
        own = all(valid(value[name], known[name], root) for name in value if name in known)
        return bool(closed) and set(schema.get("required", ())) <= set(value) and own
    if isinstance(value, list):
        few = schema["minItems"] <= len(value) <= schema["maxItems"]
        return few and all(valid(one, schema["items"], root) for one in value)
    if isinstance(value, str):
        return len(value) <= schema.get("maxLength", 10**6)
    return schema.get("minimum", value) <= value <= schema.get("maximum", value)


def constrained(constraint, count=4, **settings):
    settings = {"max_tokens": 120, "temperature": 1.5, "constraint": constraint} | settings
    return engine().generate([Request(PROMPT, seed=seed, **settings) for seed in range(count)])


@pytest.mark.parametrize("schema", SCHEMAS)
def test_whatever_ends_is_json_of_the_schema(schema):
    results = constrained(engine().constraint(json=schema))
    complete = [r for r in results if r.finish_reason == "stop"]
    assert all(valid(json.loads(r.text), schema, schema) for r in complete), [r.text for r in complete]
    assert complete or schema == SCHEMAS[-1]
    assert all(r.finish_reason == "stop" or len(r.tokens) == 120 for r in results)


def test_patterns_and_choices():
    for pattern in (r"[가-힣]{2}-\d{3}", r"^(ab|c)+d$"):
        results = constrained(engine().constraint(regex=pattern))
        assert all(re.fullmatch(pattern, r.text) for r in results if r.finish_reason == "stop"), pattern
        assert any(r.finish_reason == "stop" for r in results)
    texts = ["예 🙂", "아니오", 'a "b"\\n\n*', "ab", "abc"]
    results = constrained(engine().constraint(choice=texts), 12, temperature=3.0)
    assert {r.text for r in results} <= set(texts) and len({r.text for r in results}) > 2
    assert {r.finish_reason for r in results} == {"stop"}
    assert constrained(engine().constraint(choice=["abc"]), 1, max_tokens=1)[0].finish_reason == "length"
    # other settings cannot break a constraint
    banned = {"logit_bias": dict.fromkeys(range(293), -100.0), "min_tokens": 20, "stop": ()}
    assert constrained(engine().constraint(choice=["abc"]), 1, **banned)[0].text == "abc"


@pytest.mark.parametrize("size", [293, 320])
def test_there_is_a_bit_for_each_id_and_none_for_special_or_missing_ones(size):
    own = engine().tokenizer
    constraint = constrain(vocabulary(own, engine().ends, size), "regex", "(?s).*").start()
    bits = np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little")
    assert len(bits) == -(-size // 32) * 32
    ordinary = {i for i in range(size) if own.token_bytes(i)}
    assert set(np.flatnonzero(bits)) <= ordinary | set(engine().ends) and bits[:256].sum() > 100


def test_a_constrained_neighbour_changes_nothing():
    requests = [Request(PROMPT[:n], max_tokens=25, temperature=1.2, seed=n, tools=False) for n in (1, 2, 3)]
    alone = [r.tokens for r in engine().generate(requests)]
    constraint = engine().constraint(json=SCHEMAS[1])
    single = constrained(constraint, 1)[0].tokens
    asked = Request(PROMPT, seed=0, max_tokens=120, temperature=1.5, constraint=constraint)
    *mixed, other = engine().generate([*requests, asked])
    assert [r.tokens for r in mixed] == alone and other.tokens == single


@pytest.mark.parametrize(
    "what",
    [
        {"json": {"type": "objekt"}}, {"json": "{"}, {"json": {"$ref": "#/none"}}, {"json": {"not": {}}}, 
        {"regex": "(["}, {"regex": "x" * 60_000}, {"choice": []}, {"choice": [1]}, {"verse": "sonnet"},
        {"json": '{"items":' * 3000 + "{}" + "}" * 3000},
        {"json": {"allOf": [{"type": "string", "pattern": f".*a{i}.*"} for i in range(40)]}},
    ],
)  # fmt: skip
def test_a_wrong_or_hostile_constraint_is_an_error(what):
    with pytest.raises(UsageError, match=next(iter(what))):
        engine().constraint(**what)
