"""The page on which people write answers and rank them, and what they have judged.

python -m lmjax.annotation runs/policy prompts.jsonl
python -m lmjax.annotation.agreement annotations
"""
