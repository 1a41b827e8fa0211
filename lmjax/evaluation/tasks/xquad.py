"""XQuAD: SQuAD's questions in twelve languages (Artetxe et al. 2019, arXiv:1910.11856)."""

from __future__ import annotations

from typing import Literal

from lmjax.config import preset
from lmjax.evaluation.tasks.squad import SQuAD
from lmjax.evaluation.tasks.task import Drawing

# The words for context, question and answer in EleutherAI's harness, the lines of each language.
WORDS = {
    "ar": ("سيا", "سؤال", "إجابة"),
    "de": ("Kontext", "Frage", "Antwort"),
    "el": ("Συμφραζόμενα", "Ερώτηση", "Απάντηση"),
    "en": ("Context", "Question", "Answer"),
    "es": ("Contexto", "Pregunta", "Respuesta"),
    "hi": ("प्रसंग", "सवाल", "उत्तर"),
    "ro": ("Context", "Întrebare", "Răspuns"),
    "ru": ("Контекст", "Вопрос", "Ответ"),
    "th": ("บริบท", "คำถาม", "คำตอบ"),
    "tr": ("Bağlam", "Soru", "Cevap"),
    "vi": ("Bối cảnh", "Câu hỏi", "Trả lời"),
    "zh": ("语境", "问题", "回答"),
}
SPACELESS = ("th", "zh")


@preset
def xquad(
    path: str,
    language: Literal["ar", "de", "el", "en", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh"],
    shots: int = 0,
    examples_path: str | None = None,
    limit: int | None = None,
    drawing: Drawing = "once",
    max_tokens: int = 256,
) -> SQuAD:
    """XQuAD as EleutherAI's harness asks it, in the words of its language.

    F1 and exact match of Chinese and Thai are by characters; the harness's are of texts between
    blanks there, which mostly are all or nothing.

    Args:
      path: the authors' file, such as xquad.zh.json.
      language: of the file.
      shots, examples_path, limit, drawing: see `EvaluationTask`.
      max_tokens: most tokens of an answer.
    """
    context, question, answer = WORDS[language]
    return SQuAD(
        title=f"XQuAD {language}",
        path=path,
        shots=shots,
        examples_path=examples_path,
        limit=limit,
        drawing=drawing,
        max_tokens=max_tokens,
        by_characters=language in SPACELESS,
        template=f"{context}: {{context}}\n\n{question}: {{question}}\n\n{answer}:",
    )
