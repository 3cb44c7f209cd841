"""OpenAI's own Python client against the server."""

import json

import openai
import pydantic
import pytest

MOUSE = [{"role": "user", "content": "Tell me a story about a brave mouse."}]


def test_models_are_listed_and_found(client):
    assert [model.id for model in client.models.list()] == ["tales", "tools", "small"]
    assert client.models.retrieve("tales").owned_by == "candle-coreml"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_chat_whole_and_streamed_is_the_same(client):
    whole = client.chat.completions.create(model="tales", messages=MOUSE, temperature=0, max_completion_tokens=30)
    choice = whole.choices[0]
    assert choice.finish_reason == "length" and choice.message.role == "assistant"
    assert whole.usage.completion_tokens == 30
    stream = client.chat.completions.create(
        model="tales", messages=MOUSE, temperature=0, max_completion_tokens=30, stream=True,
        stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == choice.message.content
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1


def test_a_stream_can_be_left(client):
    stream = client.chat.completions.create(model="tales", messages=MOUSE, temperature=0, stream=True)
    for _, _ in zip(range(3), stream):
        pass
    stream.close()
    again = client.chat.completions.create(model="tales", messages=MOUSE, temperature=0, max_tokens=3)
    assert again.usage.completion_tokens == 3


def test_completions_with_log_probabilities(client):
    done = client.completions.create(model="tales", prompt=["Once upon a time", "The cat"], temperature=0,
                                     max_tokens=5, logprobs=2, seed=1)
    assert [choice.index for choice in done.choices] == [0, 1]
    assert len(done.choices[0].logprobs.tokens) == 5
    chat = client.chat.completions.create(model="tales", messages=MOUSE, temperature=0, max_tokens=4, logprobs=True,
                                          top_logprobs=3, stop=["\n"], presence_penalty=0.5, logit_bias={"5": -100})
    content = chat.choices[0].logprobs.content
    assert len(content) == 4 and len(content[0].top_logprobs) == 3
    assert content[0].logprob <= 0 and bytes(content[0].bytes).decode() == content[0].token


class Animal(pydantic.BaseModel):
    name: str
    legs: int


def test_answers_are_parsed_into_models(client):
    schema = {"type": "json_schema", "json_schema": {"name": "yes", "strict": True, "schema": {
        "type": "object", "properties": {"brave": {"type": "boolean"}}, "required": ["brave"],
        "additionalProperties": False}}}
    answer = client.chat.completions.create(model="tales", messages=MOUSE, temperature=1.2, seed=3,
                                            response_format=schema)
    assert isinstance(json.loads(answer.choices[0].message.content)["brave"], bool)


def test_parse_makes_a_schema_of_a_class(client):
    done = client.chat.completions.with_raw_response.parse(
        model="tales", messages=MOUSE, temperature=0, max_tokens=200, response_format=Animal)
    body = json.loads(done.http_response.text)
    if body["choices"][0]["finish_reason"] == "stop":
        assert done.parse().choices[0].message.parsed.name is not None


def test_tools_are_called(client):
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {
        "type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"],
        "additionalProperties": False}}}]
    asked = dict(model="tools", messages=MOUSE, tools=tools, tool_choice="required", temperature=0, max_tokens=80)
    choice = client.chat.completions.create(**asked).choices[0]
    call = choice.message.tool_calls[0]
    assert choice.finish_reason == "tool_calls" and call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.arguments == call.function.arguments
    answer = client.chat.completions.create(
        model="tools", tools=tools, max_tokens=3,
        messages=[*MOUSE, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}])
    assert answer.usage.completion_tokens == 3


def test_embeddings_in_both_encodings_are_the_same(client):
    texts = ["a cat sits", "a dog"]
    packed = client.embeddings.create(model="small", input=texts)
    plain = client.embeddings.create(model="small", input=texts, encoding_format="float")
    for one, other in zip(packed.data, plain.data):
        assert one.embedding == pytest.approx(other.embedding)
    assert packed.usage.prompt_tokens > 0


@pytest.mark.parametrize("change, error, param", [
    ({"model": "gpt-4"}, openai.NotFoundError, "model"),
    ({"temperature": 3}, openai.BadRequestError, "temperature"),
    ({"messages": [{"role": "user", "content": "word " * 600}]}, openai.BadRequestError, "messages"),
    ({"messages": [{"role": "user", "content": "a" * 3_000_000}]}, openai.APIStatusError, None),
    ({"functions": [{"name": "f"}]}, openai.BadRequestError, "functions"),
])
def test_refusals_are_the_clients_own_errors(client, change, error, param):
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": "tales", "messages": MOUSE, "max_tokens": 1, **change})
    assert caught.value.param == param
    assert caught.value.code


def test_a_wrong_key_is_refused(address):
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=address + "/v1", api_key="guess", max_retries=0).models.list()
