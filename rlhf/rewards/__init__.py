def check(spec): pass
