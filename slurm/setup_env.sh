#!/usr/bin/env bash
# Makes the environment that everything else runs in, from nothing but Python 3.11 or 3.12.
#
#   bash slurm/setup_env.sh              the environment (.venv); a second run returns at once
#   bash slurm/setup_env.sh --compile    requirements/*.in -> *.txt, the pinned versions (make requirements)
#
#   BIOMERGE_DEVICE=cpu|cuda  which pinned set (default: cuda where there is nvidia-smi, else what .venv has, else
#                             cpu). On a cluster's login node without a GPU: BIOMERGE_DEVICE=cuda.
#   PYTHON=python3.12         the interpreter (default: the first of python3.11, python3.12, python3 that fits)
#   VENV=/scratch/me/venv     where (default: .venv beside this folder)
#   BIOMERGE_TORCH_INDEX=URL  a mirror of PyTorch's CPU index
#
# pip's own settings (index-url, extra-index-url, find-links, cert, proxy, no-index) hold for uv as well.
# The environment holds exactly the pinned set: what was installed by hand goes when the pins change.
set -euo pipefail

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
SCRIPT=$ROOT/slurm/setup_env.sh
VENV=${VENV:-$ROOT/.venv}
[[ $VENV == /* ]] || VENV=$PWD/$VENV
STAMP=$VENV/biomerge-env.stamp
UNFINISHED=$VENV/biomerge-env.unfinished # there while a set is being installed, and after an interrupted run
TORCH_INDEX=${BIOMERGE_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
unset PYTHONHOME PYTHONPATH # a cluster's modules set them; they would shadow the pinned packages

say() { printf 'setup_env: %s\n' "$*"; }
die() {
  printf 'setup_env: error: %s\n' "$1" >&2
  shift
  (($#)) && printf '           %s\n' "$@" >&2
  exit 1
}

# The interpreter's version as 3.11.7 (empty where it cannot run).
python_version() { "$1" -ISc 'import platform; print(platform.python_version())' 2>/dev/null || true; }

choose_device() {
  local device=${BIOMERGE_DEVICE:-}
  if [[ -z $device ]]; then
    if command -v nvidia-smi >/dev/null; then
      device=cuda
    elif [[ -f $STAMP ]]; then
      device=$(sed -n 's/^device //p' "$STAMP")
    fi
  fi
  device=${device:-cpu}
  [[ $device == cpu || $device == cuda ]] || die "BIOMERGE_DEVICE is '$device'; it must be cpu or cuda."
  printf '%s\n' "$device"
}

# What the environment depends on. A moved environment is a broken one, so its path counts too.
stamp_text() { # device, Python version
  local hash
  hash=$(cat "$ROOT/requirements/$1.txt" "$SCRIPT" | sha256sum | cut -d' ' -f1)
  printf 'device %s\npython %s\nvenv %s\nhash %s\n' "$1" "$2" "$VENV" "$hash"
}

is_ready() {
  [[ -f $STAMP && ! -e $UNFINISHED && -x $VENV/bin/python ]] &&
    [[ $(<"$STAMP") == "$(stamp_text "$DEVICE" "$(python_version "$VENV/bin/python")")" ]]
}

find_python() {
  local candidate version found=() no_venv=() candidates=(python3.11 python3.12 python3 python)
  [[ -n ${PYTHON:-} ]] && candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    version=$(python_version "$candidate")
    [[ -n $version ]] && found+=("$candidate is $version")
    [[ $version == 3.11.* || $version == 3.12.* ]] || continue
    # The real interpreter's path: the candidate may be a shim, or belong to the environment to be replaced.
    "$candidate" -Ic 'import ensurepip, sys, venv; print(sys._base_executable)' 2>/dev/null && return
    no_venv+=("python${version%.*}-venv")
  done
  ((${#no_venv[@]})) && die "this Python cannot make virtual environments (no venv or ensurepip module)." \
    "On Debian and Ubuntu: apt-get install ${no_venv[0]}; or name another Python with PYTHON=/path/to/python3."
  die "no Python 3.11 or 3.12 found (${found[*]:-none of ${candidates[*]} runs})." \
    "Install one (Debian: python3 python3-venv; a cluster: module load python/3.11) or name it with PYTHON=."
}

check_disk() { # needed GB
  local folder=$VENV free used=0
  [[ -d $VENV ]] && used=$(du -sk "$VENV" | cut -f1)
  until [[ -d $folder ]]; do folder=$(dirname "$folder"); done
  free=$(df -Pk "$folder" | awk 'NR == 2 { print $4 }')
  ((free + used >= $1 * 1000 * 1000)) ||
    die "$folder has $((free / 1000000)) GB free; the $DEVICE environment needs about $1 GB." \
      "Make room, or put it elsewhere: VENV=/path/with/room bash slurm/setup_env.sh"
}

# pip's settings as uv's: one argument or NAME=value a line. An index that does not answer would stop uv, where pip
# goes on with the others, so folders that are not there and hosts that cannot be reached are left out, aloud.
uv_settings() {
  "$VENV/bin/python" -I - <<'PY'
import ast, os, pathlib, socket, subprocess, sys
from urllib.parse import urlsplit
from urllib.request import url2pathname

listing = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
settings = {}
for section in ("global.", "install.", ":env:."):  # as pip does: the later ones win
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        if name.startswith(section):
            settings[name.removeprefix(section).replace("_", "-")] = str(ast.literal_eval(value))

proxy = settings.get("proxy", "")
proxied = proxy or any(os.environ.get(n) for n in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"))


def usable(place):
    url = urlsplit(place)
    if url.scheme == "file" or not url.netloc:
        path = pathlib.Path(url2pathname(url.path) if url.scheme == "file" else place).expanduser()
        reason = "" if path.exists() else "there is no such folder"
    else:
        reason = ""
        try:
            if not proxied:
                socket.create_connection((url.hostname, url.port or {"http": 80}.get(url.scheme, 443)), 5).close()
        except OSError as error:
            reason = str(error)
    if reason:
        print(f"setup_env: pip's setting {url._replace(netloc=url.hostname or '').geturl()} is left out: {reason}", file=sys.stderr)
    return not reason


own = any(os.environ.get(n) for n in ("UV_DEFAULT_INDEX", "UV_INDEX_URL"))
if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
    print("--no-index")
elif settings.get("index-url") and not own:
    print("--default-index", settings["index-url"], sep="\n")
for place in settings.get("extra-index-url", "").split():
    if usable(place):
        print("--index", place, sep="\n")
for place in settings.get("find-links", "").split():
    if usable(place):
        print("--find-links", place if urlsplit(place).netloc else os.path.expanduser(place), sep="\n")
for host in settings.get("trusted-host", "").split():
    print("--allow-insecure-host", host, sep="\n")
print("--index-strategy", "unsafe-best-match", sep="\n")  # pip's: the best version of all indexes, not the first index
if os.path.isfile(settings.get("cert", "")) and "SSL_CERT_FILE" not in os.environ:
    print("SSL_CERT_FILE=" + settings["cert"])
if proxy and "HTTPS_PROXY" not in os.environ:
    print("HTTPS_PROXY=" + proxy)
PY
}

read_uv_settings() { # cpu or cuda
  local line last=
  UV_ARGS=()
  while IFS= read -r line; do
    # shellcheck disable=SC2163  # NAME=value, exported as it stands
    if [[ $line =~ ^[A-Z_]+= ]]; then
      export "$line"
    elif [[ $1 == cuda && $last == --find-links && -n $(compgen -G "${line#file://}/torch-*+cpu-*.whl") ]]; then
      unset 'UV_ARGS[-1]' # X+cpu would satisfy torch==X
    else
      UV_ARGS+=("$line")
    fi
    last=$line
  done < <(uv_settings)
  ((${#UV_ARGS[@]})) || die "pip's settings cannot be read: $VENV/bin/python -m pip config list"
}

uv_pip() { # with uv's progress bar on a terminal, without its 270 lines in a log
  if [[ -t 2 ]]; then "$VENV/bin/uv" pip "$@"; else "$VENV/bin/uv" pip --quiet "$@"; fi
}

pinned() { sed -n "s/^$1==\([^ ;]*\).*/\1/p" "$2"; } # distribution, requirement file

# The local wheels of the pinned CPU torch in pip's find-links folders: one path a line.
local_torch_wheels() { # version, Python tag (cp311 or *)
  local i folder
  for ((i = 0; i + 1 < ${#UV_ARGS[@]}; i++)); do
    [[ ${UV_ARGS[i]} == --find-links ]] || continue
    folder=${UV_ARGS[i + 1]#file://}
    compgen -G "$folder/torch-${1/+/*}-$2-*.whl" || true
  done
}

# torch+cpu is not on the ordinary index. It comes from a wheel folder where there is one, else from PyTorch's CPU
# index, and only torch does, so that its stale copies of other packages are never chosen.
install_cpu_torch() { # Python version
  local version tag
  version=$(pinned torch "$ROOT/requirements/cpu.txt")
  tag=cp3$(cut -d. -f2 <<<"$1")
  [[ -n $(local_torch_wheels "$version" "$tag") ]] && return
  uv_pip install --python "$VENV/bin/python" --no-deps --default-index "$TORCH_INDEX" "torch==$version" && return
  local wheels
  wheels=$(local_torch_wheels "$version" '*')
  [[ -n $wheels ]] && die "torch $version for Python $1 was not found: not at $TORCH_INDEX," \
    "and pip's find-links folders hold it for another Python only:" "${wheels//$'\n'/, }" \
    "Name that Python, for instance PYTHON=python3.11 bash slurm/setup_env.sh"
  die "torch $version for Python $1 could not be installed from $TORCH_INDEX (uv's reason is above)." \
    "Is the host reachable from here? A mirror: BIOMERGE_TORCH_INDEX=URL. A downloaded wheel: PIP_FIND_LINKS=FOLDER."
}

explain_failure() {
  local glibc
  glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null | cut -d' ' -f2)
  printf 'setup_env: error: %s\n' "the $DEVICE set could not be installed; uv's reason is above." >&2
  printf '           %s\n' "No route to an index: set pip's index-url, find-links or proxy; uv takes them over." \
    "No such version there: another mirror, or new pins with 'make requirements'." \
    "What was downloaded stays in uv's cache, so that a second try is shorter." >&2
  if [[ -n $glibc && $(printf '%s\n2.31\n' "$glibc" | sort -V | head -n 1) != 2.31 ]]; then
    printf '           %s\n' "This machine's glibc is $glibc: below 2.31 some wheels (llguidance, which vLLM needs)" \
      "must be compiled and want Rust (rustc, cargo) on the PATH; a container avoids that." >&2
  fi
  exit 1
}

make_venv() {
  local python version
  if [[ -e $VENV && ! -f $VENV/pyvenv.cfg ]] && [[ -n $(ls -A "$VENV") ]]; then
    die "$VENV exists and is no virtual environment: it is left alone." "Name another place with VENV=."
  fi
  # Both what follows here and uv's sync take away what is not pinned.
  if [[ -f $VENV/pyvenv.cfg && ! -e $STAMP && ! -e $UNFINISHED ]] && site_packages | grep -qvE "$BARE"; then
    die "$VENV is an environment with packages that this script did not install: it is left alone." \
      "Name another place with VENV=, or remove it yourself."
  fi
  version=$(python_version "$VENV/bin/python")
  if [[ -e $UNFINISHED ]]; then
    say "an earlier run was interrupted: starting $VENV afresh"
  elif [[ $version == 3.11.* || $version == 3.12.* ]] &&
    [[ -z ${PYTHON:-} || $(python_version "$PYTHON") == "$version" ]]; then
    return # what is there can be brought up to date
  fi
  python=$(find_python)
  say "$python ($(python_version "$python")) -> $VENV"
  rm -rf -- "$VENV"
  "$python" -m venv "$VENV" || die "$python -m venv $VENV failed (see above)."
}

site_packages() { ls "$VENV/lib/python3."*/site-packages; }
BARE='^(pip|setuptools|wheel|pkg_resources|_distutils_hack|distutils-precedence|_virtualenv|__pycache__)' # a new one's

# uv touches nothing before it has everything. So where a good environment stood and nothing was touched (a GPU
# node without internet, say), it stays good; anything else that ends here is redone from scratch next time.
keep_what_stood() { # the stamp and the packages before
  if [[ -e $UNFINISHED && -n $1 && $(site_packages) == "$2" ]]; then
    printf '%s\n' "$1" >"$STAMP"
    rm -f -- "$UNFINISHED"
  fi
}

install() {
  local version uv_version requirements=$ROOT/requirements/$DEVICE.txt
  [[ $(uname -sm) == "Linux x86_64" ]] ||
    die "the pinned sets are for Linux on x86_64, this is $(uname -sm)." "A Linux container or WSL 2 runs them."
  # CPU: 4.8 GB measured. CUDA: an estimate from its parts. uv's cache is not counted (it shares files where it can).
  if [[ $DEVICE == cpu ]]; then check_disk 6; else check_disk 16; fi
  make_venv
  STOOD=$(cat "$STAMP" 2>/dev/null || true)
  STOOD_PACKAGES=$(site_packages)
  trap 'keep_what_stood "$STOOD" "$STOOD_PACKAGES"' EXIT
  : >"$UNFINISHED"
  rm -f -- "$STAMP"
  version=$(python_version "$VENV/bin/python")
  uv_version=$(pinned uv "$requirements")
  if [[ $("$VENV/bin/uv" --version 2>/dev/null) != "uv $uv_version"* ]]; then
    PIP_USER=0 "$VENV/bin/python" -m pip install -qq --disable-pip-version-check "uv==$uv_version" ||
      die "pip could not install uv $uv_version (see above)." "Check pip's index-url, proxy and cert: pip config list"
  fi
  read_uv_settings "$DEVICE"
  say "installing the $DEVICE set for Python $version (minutes at first, a minute from uv's cache)"
  if [[ $DEVICE == cpu ]]; then install_cpu_torch "$version"; fi
  uv_pip sync --python "$VENV/bin/python" --compile-bytecode "${UV_ARGS[@]}" "$requirements" || explain_failure
  uv_pip install --python "$VENV/bin/python" --no-deps --no-build-isolation -e "$ROOT" ||
    die "the project itself could not be installed from $ROOT (see above)."
  stamp_text "$DEVICE" "$version" >"$STAMP"
  rm -f -- "$UNFINISHED"
}

warn_of_old_driver() {
  local driver
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || return 0
  [[ $driver =~ ^([0-9]+)\. ]] && ((BASH_REMATCH[1] < 580)) &&
    say "warning: NVIDIA driver $driver; the CUDA 13 builds of torch and vLLM want 580 or newer"
  return 0
}

# One file serves Python 3.11 and 3.12: resolved for 3.11, then for 3.12 within the same versions.
compile_pins() {
  local set overrides wheels work
  [[ -x $VENV/bin/uv ]] || die "no uv in $VENV yet: run 'make env' first."
  cd "$ROOT"
  work=$(mktemp -d)
  # shellcheck disable=SC2064  # the path as it is now
  trap "rm -rf -- '$work'" EXIT
  for set in cpu cuda; do
    read_uv_settings "$set"
    local args=("${UV_ARGS[@]}" --python-platform x86_64-manylinux_2_31 --no-annotate --no-emit-index-url
      --no-emit-find-links --custom-compile-command "make requirements" "requirements/$set.in")
    wheels=
    if [[ $set == cpu ]]; then
      overrides=requirements/overrides.txt
      wheels=$(local_torch_wheels "$(pinned torch requirements/cpu.in)" '*')
      args+=(--override "$overrides")
      [[ -n $wheels ]] || args+=(--index "$TORCH_INDEX")
    fi
    uv_pip compile "${args[@]}" --upgrade --python-version 3.11 --output-file "$work/$set.txt" >/dev/null ||
      die "requirements/$set.in has no solution for Python 3.11 (see above)."
    if [[ -n $wheels && $wheels != *-cp312-* ]]; then
      say "$set: not checked for Python 3.12, for which the local wheel folder has no torch"
    else
      uv_pip compile "${args[@]}" --python-version 3.12 --constraint "$work/$set.txt" \
        --output-file "$work/$set-312.txt" >/dev/null ||
        die "requirements/$set.in has no solution for Python 3.12 within the versions for 3.11 (see above)."
      # A package that only 3.11 needs does no harm on 3.12; the other way round something would be missing.
      ! grep '==' "$work/$set-312.txt" | grep -vxFf "$work/$set.txt" >&2 ||
        die "Python 3.12 needs these, 3.11 does not (above): name them in requirements/base.in."
    fi
    cp "$work/$set.txt" "requirements/$set.txt"
    say "requirements/$set.txt: $(grep -c '==' "requirements/$set.txt") versions"
  done
}

if [[ ${BASH_SOURCE[0]} != "$0" ]]; then return; fi # sourced by a test, for a function

case ${1:-} in
  --compile)
    compile_pins
    exit
    ;;
  --help | -h)
    sed -n '2,/^set -/s/^# \{0,1\}//p' "$SCRIPT"
    exit
    ;;
  '') ;;
  *) die "unknown argument '$1' (see --help)." ;;
esac

DEVICE=$(choose_device)
is_ready && exit # quickly and quietly: make calls this before everything else
mkdir -p -- "$(dirname -- "$VENV")"
if command -v flock >/dev/null && exec 9>"$VENV.lock"; then
  flock -n 9 || { say "another setup is at work in $VENV: waiting" && flock 9; } || true
  is_ready && exit # another job did it meanwhile
fi
SECONDS=0
if [[ $DEVICE == cuda ]]; then warn_of_old_driver; fi
install
say "ready in $SECONDS s: $VENV ($DEVICE)"
say "next: 'make debug' runs the whole pipeline, 'make lab' opens the notebooks; or: source ${VENV#"$PWD/"}/bin/activate"
