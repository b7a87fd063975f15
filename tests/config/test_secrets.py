"""Secrets: refused in every part of a recipe, by a message that does not show them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.config.reading import RECIPES, config_from_dict
from bpgo_video.config.secrets import check_secrets, without_secrets
from tests.made.recipes import RECIPE

SECRET = "s3cr3t-Value_0123456789"
FORMS = {
    "http://user:{}@node7:8011": "url",
    "https://{}@node7": "url",
    "s3://key:{}@bucket/prompts": "url",
    "https://host/prompts-{{0..3}}.tar?sv=1&sig={}": "query",
    "https://host/prompts?access_token={}": "query",
    "https://host/p?X-Amz-Signature={}&a=b": "query",
    "https://host/p?x-amz-security-token={}": "query",
    "pipe:curl -H 'Authorization: Bearer {}' https://host/p": "header",
    "curl -H 'authorization: basic {}' https://host/p": "header",
    "bearer {}": "header",
    "hf_{}".replace("{}", "a" * 34): "form",
    "ghp_{}".replace("{}", "b" * 36): "form",
}
HARMLESS = (
    "http://node7:8011", "https://host/prompts/prompts-{000000..000003}.tar?versionId=3", "s3://bucket/prompts",
    "pipe:ssh me@host cat prompts/prompts-{000000..000003}.tar", "org/name@main", "hf://datasets/org/name@v1/prompts",
    'pipe:curl -sf -H "Authorization: Bearer $TOKEN" https://host/p', "https://me:$PASSWORD@host/p",
    "https://host/p?sig=$SIG&x=1", "a red circle: moving @ noon", "runs/sk-1", "monkey", "package:tiny",
    "basic composition", "answer basic questions", "a bearer carrying-something-very-heavy",
)  # fmt: skip


@pytest.fixture
def tree() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(RECIPE.read_text())
    return read


def refusal(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(tree, "mine.yaml")
    assert SECRET not in str(caught.value), "the message names the key, not the value"
    return str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_secrets_of_every_form_are_found_and_hidden(form: str) -> None:
    text = form.format(SECRET)
    hidden = without_secrets(text)
    assert "***" in hidden
    assert SECRET not in hidden
    assert without_secrets(hidden) == hidden
    with pytest.raises(ConfigError, match=r"mine: a\.1\.b holds a password or token"):
        check_secrets({"a": ["", {"b": text}]}, "mine")


@pytest.mark.parametrize("text", HARMLESS)
def test_other_values_are_taken_as_they_are(text: str) -> None:
    assert without_secrets(text) == text
    check_secrets({"rewards": {"far": {"options": {"url": text, "token_env": "REWARD_TOKEN"}}}}, "mine")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_hold_no_secrets(path: Path) -> None:
    check_secrets(yaml.safe_load(path.read_text()), str(path))


@pytest.mark.parametrize(
    ("reward", "key", "way_out"),
    [
        ({"model": "remote", "options": {"url": f"http://me:{SECRET}@node7:8011"}}, "url", "with token_env"),
        ({"model": "remote", "options": {"url": f"http://n/?token={SECRET}"}}, "url", "with token_env"),
        (
            {"model": "worker", "options": {"environment": {"HF_TOKEN": SECRET}}},
            "environment.HF_TOKEN",
            "export",
        ),
        ({"model": "worker", "options": {"settings": {"api_key": SECRET}}}, "settings.api_key", "variable"),
        ({"model": "worker", "options": {"python": f"https://{SECRET}@h/python"}}, "python", "variable"),
    ],
)
def test_a_secret_of_a_reward_is_refused_with_the_way_out(
    tree: dict[str, Any], reward: dict[str, Any], key: str, way_out: str
) -> None:
    message = refusal(tree | {"rewards": {"far": reward}})
    assert f"mine.yaml: rewards.far.options.{key} holds" in message
    assert way_out in message


def test_a_secret_is_refused_in_every_text_of_a_recipe(tree: dict[str, Any]) -> None:
    """Before types are checked, since those messages show the value."""
    places = [(section, name) for section, values in tree.items() if isinstance(values, dict) for name in values]
    assert len(places) > 20
    for section, name in places:
        changed = copy.deepcopy(tree)
        changed[section][name] = f"https://me:{SECRET}@host/x"
        assert f"{section}.{name} holds a password or token" in refusal(changed)
