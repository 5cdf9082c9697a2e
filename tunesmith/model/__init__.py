"""The decoder: knows no cache and no trainer.

The legend of shape suffixes, for the whole project:

    T  packed tokens        D  hidden size        N  query heads       K  key/value heads
    H  head dimension       F  output features    V  vocabulary        R  LoRA rank
    P  pages                S  slots in a page    B  requests          E  experts

    hidden_TD    weight_FD    query_TNH    key_TKH    logits_TV
"""
