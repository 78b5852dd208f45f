"""All texts of the chat page, in each language; without Gradio, so that they are there while it loads."""

TEXTS = {
    "en": {
        "placeholder": "Say something",
        "greeting": "Say something, or try one of these.",
        "placeholder_base": "The beginning of a text",
        "greeting_base": "This model was not taught to answer: it goes on with the text that you begin.",
        "new_chat": "New chat",
        "send": "Send",
        "stop": "Stop",
        "log": "Conversation",
        "copy": "Copy",
        "about": "This model",
        "settings": "Settings",
        "temperature": "Temperature",
        "temperature_info": "0: the likeliest token each time",
        "top_k": "Top-k",
        "top_k_info": "choose among so many tokens; 0: among all",
        "max_tokens": "Longest answer",
        "max_tokens_info": "tokens",
        "probabilities": "Token probabilities",
        "probabilities_info": "From the next answer on. Point at a token, or tap it, to see what else could have come.",
        "likely": "likely",
        "unlikely": "unlikely",
        "parameters": "parameters",
        "layers": "layers",
        "context": "tokens of context",
        "trained": "trained in",
        "bits_per_byte": "bits per byte",
        "word_problems": "word problems",
        "identity": "identity",
        "spelling_bee": "spelling bee",
        "lottery": "lottery",
        "speed": "tokens/s",
        "speed_forgotten": "tokens/s · the context is full: the oldest messages are forgotten",
        "waiting": "Waiting for a free place …",
        "too_long": "This message is longer than the model's context; tokens:",
        "too_many_characters": "This message is too long; characters:",
        "slow_down": "Too many messages; try again in a minute.",
        "busy": "Everybody wants to talk right now; try again in a moment.",
        "loading": "The model is still loading; try again in a moment.",
        "opens": "The model is loading. This page opens when it is ready.",
        "draining": "The service is shutting down.",
        "dead": "The model has stopped; the service must be started again.",
        "failed": "This could not be answered:",
    },
    "ko": {
        "placeholder": "메시지를 입력하세요",
        "greeting": "말을 걸거나 예시를 골라 보세요.",
        "placeholder_base": "이어 쓸 글의 첫머리",
        "greeting_base": "대화를 배우지 않은 모델입니다. 글의 첫머리를 주면 이어서 씁니다.",
        "new_chat": "새 대화",
        "send": "보내기",
        "stop": "멈추기",
        "log": "대화",
        "copy": "복사",
        "about": "이 모델",
        "settings": "설정",
        "temperature": "온도",
        "temperature_info": "0이면 항상 가장 그럴듯한 토큰",
        "top_k": "Top-k",
        "top_k_info": "이 개수의 토큰 중에서 선택, 0이면 전체",
        "max_tokens": "답변 최대 길이",
        "max_tokens_info": "토큰",
        "probabilities": "토큰 확률",
        "probabilities_info": "다음 답변부터 표시합니다. 토큰을 가리키거나 누르면 대신 나올 수 있었던 토큰이 보입니다.",
        "likely": "높음",
        "unlikely": "낮음",
        "parameters": "파라미터",
        "layers": "층",
        "context": "문맥(토큰)",
        "trained": "학습 시간",
        "bits_per_byte": "바이트당 비트",
        "word_problems": "문장제",
        "identity": "정체성 질문",
        "spelling_bee": "철자 맞히기",
        "lottery": "복권",
        "speed": "토큰/초",
        "speed_forgotten": "토큰/초 · 문맥이 가득 차서 가장 오래된 메시지는 잊었습니다",
        "waiting": "차례를 기다리고 있습니다 …",
        "too_long": "메시지가 모델의 문맥보다 깁니다. 토큰 수:",
        "too_many_characters": "메시지가 너무 깁니다. 글자 수:",
        "slow_down": "메시지가 너무 많습니다. 1분 뒤에 다시 시도하세요.",
        "busy": "지금은 이용자가 많습니다. 잠시 뒤에 다시 시도하세요.",
        "loading": "모델을 불러오는 중입니다. 잠시 뒤에 다시 시도하세요.",
        "opens": "모델을 불러오는 중입니다. 준비되면 페이지가 열립니다.",
        "draining": "서비스를 종료하는 중입니다.",
        "dead": "모델이 멈췄습니다. 서비스를 다시 시작해야 합니다.",
        "failed": "답하지 못했습니다:",
    },
}
EXAMPLES = ["hello", "who are you?", "Tom has 12 apples and buys 30 more. How many?", "what do you like to do?"]
LOGIN = "Any name will do; the password is an API key. 이름은 아무것이나, 비밀번호는 API 키입니다."

WAIT = """<!doctype html><html lang={language}><meta charset=utf-8><meta http-equiv=refresh content=2>
<meta name=viewport content="width=device-width"><meta name=color-scheme content="light dark"><title>jaxchat</title>
<p style="font: 1rem system-ui, sans-serif; margin: 4rem auto; max-width: 40rem; padding: 0 1rem">{words}"""


def wait_page(state: str, accepted: str, language: str) -> str:
    """HTML of the page while it or the model loads; it reloads itself.

    In the language of `serve.language`, or else of the browser (`accepted`: its Accept-Language header).
    """
    first = accepted.split(",")[0].split("-")[0].strip().lower()
    language = next((name for name in (language, first) if name in TEXTS), "en")
    words = TEXTS[language]
    return WAIT.format(language=language, words=words["dead"] if state == "dead" else words["opens"])


def texts(language: str) -> dict[str, dict[str, str]]:
    """The texts for browsers of each language: in that language, or in the one of `serve.language`."""
    fixed = TEXTS.get(language)
    return {name: fixed or words for name, words in TEXTS.items()}
