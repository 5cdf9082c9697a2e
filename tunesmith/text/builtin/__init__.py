"""Seeded generators of the text that `builtin:tiny` is pre-trained on, and of the demo's shop questions.

vocabulary   names and values: every string belongs to exactly one split
catalogue    entries (a name and its attributes) and the layouts they are written in
questions    phrasings and manners of answering, apart for every split
stories, skills, talk   what a small model should have read besides catalogues
pretrain     rows of all of it
shop         one shop's questions, answered in that shop's manner
tokenizer    trains the tokenizer of builtin:tiny
"""
