# Debian packages of one architecture, fetched with package state of our own; read by the shell scripts beside it.
#
# The machine's package configuration is read and never changed: apt-get works on copies of the machine's source
# lists, with APT::Architecture set and every Dir:: under the cache. Signatures are checked with the machine's keyrings.
# Works as root and as an ordinary user.
#
# The reader sets `arch` (i386, amd64), has `cache` and `complete` (is everything there?), and calls packages_begin,
# which ends the script if another run has fetched everything meanwhile; afterwards image_of, version_of and obtain.
# `work` is a directory that goes away with the script.

suite=${SUBRING_DEBIAN_SUITE:-bookworm}

say() { printf '%s: %s\n' "${0##*/}" "$*"; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

cache_directory() { # sets `cache`, absolute and writable
    cache=${SUBRING_CACHE:-$1}
    mkdir -p "$cache" 2>/dev/null || die "cannot create the cache directory $cache (set SUBRING_CACHE to a writable one)"
    cache=$(cd "$cache" && pwd)
    [ -w "$cache" ] || die "the cache directory $cache is not writable (set SUBRING_CACHE to a writable one)"
}

# The machine's Debian sources, with its release's name replaced by the suite wanted. Entries limited to
# other architectures lose that limit; sources that are no Debian suite are left out.
keep_deb822() { # paragraphs whose Suites name a Debian suite
    awk -v RS= -v m="$machine" -v s="$suite" '
        {
            n = split($0, line, "\n"); out = ""; suites = ""; off = 0
            for (i = 1; i <= n; i++) {
                l = line[i]
                if (l ~ /^#/) continue
                if (l ~ /^Architectures:/) continue
                if (l ~ /^Types:/) l = "Types: deb"
                if (l ~ /^Enabled:[ \t]*(no|false|0)/) off = 1
                if (l ~ /^Suites:/) {
                    gsub("(^|[ \t])" m, " " s, l); sub(/^ *Suites:/, "Suites:", l); suites = l
                }
                out = out l "\n"
            }
            if (!off && suites ~ ("[ \t]" s "(-updates|-security)?([ \t]|$)")) printf "%s\n", out
        }' "$1"
}
keep_list() { # "deb [options] uri suite components"
    awk -v m="$machine" -v s="$suite" '
        $1 == "deb" {
            sub(/arch=[^] \t]*/, "")
            i = 2
            if ($2 ~ /^\[/) { while (i <= NF && $i !~ /\]$/) i++; i++ }
            t = $(i + 1); sub("^" m, s, t)
            if (t ~ ("^" s "(-updates|-security|/updates)?$")) { $(i + 1) = t; gsub(/\[ *\]/, ""); print }
        }' "$1"
}

packages_begin() { # the name of a package that must be known
    machine=$( (. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}") 2>/dev/null || true)
    machine=${machine:-$suite}
    for tool in apt-get apt-cache dpkg-deb flock; do
        command -v "$tool" >/dev/null || die "missing: the program $tool (a Debian-like machine is needed to fetch packages)"
    done

    # One run at a time; a second one waits and then finds everything there.
    exec 9>"$cache/.lock"
    if ! flock -n 9; then
        say "another run holds the lock, waiting"
        flock -w 600 9 || die "another run has held $cache/.lock for 10 minutes"
    fi
    if [ -z "${force:-}" ] && complete; then say "fetched by another run"; exit 0; fi

    work=$(mktemp -d "$cache/.fetch.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    apt=$cache/.apt
    mkdir -p "$apt"/{state/lists/partial,cache/archives/partial,parts,preferences.d}
    rm -rf "$apt/sources" && mkdir -p "$apt/sources"
    : >"$apt/state/status"
    : >"$apt/preferences"

    shopt -s nullglob
    for f in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        if [ -r "$f" ]; then keep_list "$f" >>"$apt/sources/machine.list"; fi
    done
    for f in /etc/apt/sources.list.d/*.sources; do
        if [ -r "$f" ]; then keep_deb822 "$f" >>"$apt/sources/machine.sources"; fi
    done
    for f in "$apt"/sources/*; do [ -s "$f" ] || rm -f "$f"; done
    [ -n "$(ls "$apt/sources")" ] || die "missing: a Debian source in /etc/apt (no deb line or stanza for $machine)"

    # The machine's own apt settings (a proxy, say) stay in force, but not its hooks.
    {
        printf '#include "/etc/apt/apt.conf.d/";\n'
        printf '#clear APT::Update;\n#clear DPkg;\n#clear APT::Archives;\n'
    } >"$apt/parts/subring.conf"
    printf 'Dir::Etc::parts "%s";\n' "$apt/parts" >"$apt/apt.conf"
    export APT_CONFIG=$apt/apt.conf
    options=(
        -o APT::Architecture="$arch" -o APT::Architectures="$arch"
        -o Dir::State="$apt/state" -o Dir::State::status="$apt/state/status" -o Dir::Cache="$apt/cache"
        -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$apt/sources"
        -o Dir::Etc::preferences="$apt/preferences" -o Dir::Etc::preferencesparts="$apt/preferences.d"
        -o Dir::Log="$apt/state" -o Acquire::Languages=none -o Acquire::Retries=2
        -o Acquire::http::Timeout=30 -o Acquire::https::Timeout=30 -o APT::Get::List-Cleanup=0
    )
    # The unprivileged download user cannot see a cache inside somebody's home.
    if [ "$(id -u)" = 0 ]; then options+=(-o APT::Sandbox::User=root); fi

    say "reading the $arch package lists of $suite"
    update() { apt-get "${options[@]}" "$@" -o APT::Update::Error-Mode=any -qq update >"$work/update.log" 2>&1; }
    first_error() { grep -m1 '^E:' "$work/update.log" || tail -n1 "$work/update.log"; }
    # A mirror in the middle of its own update can hold one compressed form of a list and not the other.
    if ! update && ! update -o Acquire::CompressionTypes::Order::=gz; then
        # The release's own list is enough to go on with (what arrives is verified all the same).
        apt-cache "${options[@]}" show "$1" >/dev/null 2>&1 ||
            die "missing: the $arch package lists of $suite (no network?): $(first_error)"
        say "going on without one package list: $(first_error)"
    fi
}

# What a package's newest version depends on by the name pattern given: the image of a kernel metapackage.
image_of() {
    apt-cache "${options[@]}" --no-all-versions show "$1" 2>/dev/null |
        sed -n 's/^Depends: //p' | tr ',|' '\n\n' | sed 's/^ *//; s/ .*//' |
        grep -m1 -E '^linux-image-[0-9]' || true
}
version_of() {
    apt-cache "${options[@]}" --no-all-versions show "$1" 2>/dev/null | sed -n 's/^Version: //p' | head -n1
}
obtain() { # package -> directory with its files
    local package=$1 into=$2 version
    version=$(version_of "$package")
    [ -n "$version" ] || return 1
    say "fetching $package $version ($arch)"
    mkdir -p "$work/deb" "$into"
    (cd "$work/deb" && apt-get "${options[@]}" -qq download "$package=$version") >"$work/download.log" 2>&1 || return 1
    local deb=("$work/deb/${package}"_*_"$arch".deb)
    [ ${#deb[@]} = 1 ] || return 1
    # Only what is wanted leaves the archive; a kernel's modules are 300 MB.
    dpkg-deb --fsys-tarfile "${deb[0]}" | tar -x -C "$into" --no-same-owner --wildcards "${@:3}" || return 1
    rm -f "${deb[0]}"
}
