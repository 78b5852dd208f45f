"""Words of the chat page, in each language, and its looks."""

TEXTS = {
    "en": {
        "placeholder": "Say something",
        "greeting": "Say something to the model, or try one of these.",
        "settings": "Settings",
        "temperature": "Temperature",
        "temperature_info": "0: the likeliest word each time",
        "top_k": "Top-k",
        "top_k_info": "0: among all tokens",
        "max_tokens": "Longest answer",
        "max_tokens_info": "tokens",
        "model": "This model",
        "parameters": "parameters",
        "layers": "layers",
        "context": "tokens of context",
        "trained": "trained in",
        "bits_per_byte": "bits per byte",
        "word_problems": "word problems",
        "identity": "identity",
        "speed": "tokens/s",
        "speed_forgotten": "tokens/s · the context is full: the oldest messages are forgotten",
    },
    "ko": {
        "placeholder": "메시지를 입력하세요",
        "greeting": "모델에게 말을 걸거나 예시를 골라 보세요.",
        "settings": "설정",
        "temperature": "온도",
        "temperature_info": "0이면 항상 가장 그럴듯한 단어",
        "top_k": "Top-k",
        "top_k_info": "0이면 모든 토큰 중에서",
        "max_tokens": "답변 최대 길이",
        "max_tokens_info": "토큰",
        "model": "이 모델",
        "parameters": "파라미터",
        "layers": "층",
        "context": "문맥(토큰)",
        "trained": "학습 시간",
        "bits_per_byte": "바이트당 비트",
        "word_problems": "문장제",
        "identity": "정체성 질문",
        "speed": "토큰/초",
        "speed_forgotten": "토큰/초 · 문맥이 가득 차서 가장 오래된 메시지는 잊었습니다",
    },
}
EXAMPLES = ["hello", "who are you?", "Tom has 12 apples and buys 30 more. How many?", "what do you like to do?"]
CSS = """
.gradio-container { width: 100% !important; max-width: 1120px !important; margin: 0 auto !important; }
.gradio-container .main { padding-bottom: .5rem !important; }
footer { display: none !important; }
@media (max-width: 640px) { .gradio-container .main { padding: .5rem .8rem !important; } }
#talk { gap: .5rem; }
#chat, #chat .bubble-wrap { border: none !important; background: transparent; box-shadow: none; }
#chat .message-row .message { border: none !important; box-shadow: none !important; }
#chat .bot.message { background: transparent !important; padding-left: 0 !important; }
#chat .user.message { background: var(--block-background-fill) !important; border-radius: 14px !important; }
#chat .message-content .md { white-space: pre-wrap !important; overflow-wrap: anywhere; }
#chat .message-buttons .icon-button-wrapper { border: none; box-shadow: none; background: transparent; opacity: .55; }
#chat .message-buttons:hover .icon-button-wrapper { opacity: 1; }
#chat .thought-group { width: fit-content; margin: 0 0 .3rem; padding: 0; border: none; }
#chat .thought-group .title { padding: .15rem .6rem; border-radius: 8px; background: var(--block-background-fill);
  font-family: var(--font-mono); font-size: .85rem; pointer-events: none; }
#chat .thought-group .arrow { display: none; }
#chat .example { border: 1px solid var(--border-color-primary); box-shadow: none; }
#box { border: 1px solid var(--border-color-primary); border-radius: 14px; }
#status { min-height: 1.3rem; padding: 0 .6rem !important; font-size: .8rem; opacity: .6; }
#side [data-testid=block-info] { padding: 0; background: none; color: inherit; font-weight: 400; }
#card h1 { font-size: 1.25rem; margin: .4rem 0 0; }
#card p { margin: 0; opacity: .65; }
#card dl { display: grid; grid-template-columns: 1fr auto; gap: .3rem .8rem; margin: .8rem 0 0; font-size: .9rem; }
#card dt { opacity: .65; }
#card dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
"""
