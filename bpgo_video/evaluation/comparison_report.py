from pathlib import Path
def write_report(output, compared, shown=24): return output
