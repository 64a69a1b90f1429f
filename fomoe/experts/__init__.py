"""fomoe.experts: where an expert lies, who stays, who comes next, who may stand in, and who moves
the bytes.
"""
