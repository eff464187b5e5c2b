import sys
sys.path.insert(0,'/tmp/wt/rules-work/b')
from pathlib import Path
import kvmmmu; assert 'rules-work/b' in kvmmmu.__file__
from kvmmmu.conform.golden import check
bad=0
for p in sorted(Path('/tmp/wt/shared').glob('golden*/*.tar.xz')):
    if p.name=='scripts.tar.xz' or (p.parent.name=='golden-3.1' and 'on-6.1' not in p.name): continue
    for r in check(p):
        if not r.ok: print(p.name,r.part,r.agreed,r.total,r.disagreements[:1]); bad=1
print('golden done bad',bad)
