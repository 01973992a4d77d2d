#!/usr/bin/env bash
# Jobs are scripts in a folder, all of them done in one reservation. The worker is spoken to with curl alone.
#
#   queue/new/NAME       waits.  Write a job elsewhere on the same disk and `mv` it in: that is one step.
#   queue/current/NAME   was begun
#   queue/done/NAME, queue/failed/NAME
#
# The `mv` to done is the acknowledgement. What a consumer that died has begun goes back to new at the next start.
set -u
shopt -s nullglob dotglob # file names of any kind
curl() { command curl --noproxy '*' "$@"; } # whatever proxy the machine has: the worker is on this one
port=${NULL_CONTROL_PORT:-18999}
control=http://127.0.0.1:$port
queue=${JOB_FOLDER:-queue}
current=$queue/current${CONTAINER_ID:+.$CONTAINER_ID} # a volume may be shared by instances
mkdir -p "$queue"/{new,done,failed} "$current"
find "$current" -mindepth 1 -maxdepth 1 -exec mv -t "$queue/new" -- {} +

# GET /health, for as long as this shell lives. It is told each job's process group, and ends the last one should this
# shell be killed: it knows by the end of its stdin.
coproc HEALTH { exec python3 -c '
import http.server, os, signal, sys, threading
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *_):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Health)
threading.Thread(target=server.serve_forever, daemon=True).start()
group = 0
for line in sys.stdin:
    group = int(line)
if group:
    os.killpg(group, signal.SIGKILL)
' "${HEALTH_PORT:-18998}"; }

stop=
trap 'stop=1' TERM INT

# The liveness connection, on descriptor 3: children inherit it, so the hold lasts until the last of them is gone. It is
# looked at once a second, and opened again when it has broken, as it does when the worker is restarted.
attach() {
    { exec 3<>"/dev/tcp/127.0.0.1/$port"; } 2>/dev/null || return 0
    printf 'POST /attach?reservation_id=%s&extend=1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n' "$id" >&3
}
stay_attached() {
    while read -r -t 0.01 -u 3 _; do :; done 2>/dev/null
    (($? > 128)) || attach # more than 128: nothing to read; else: its end, or it never was
}

# The next job, moved to current; its name is then in $job. One that is being moved by another is passed over.
take() {
    local path
    for path in "$queue"/new/*; do
        job=${path##*/}
        mv -T -- "$path" "$current/$job" 2>/dev/null && return
    done
    return 1
}

# By its id: should the reservation be over by now, this ends no other one.
release() {
    curl -sS --retry 5 --retry-connrefused "$control/release" -d "{\"reservation_id\": \"$id\", \"result\": $1}"
    echo
    exec 3>&-
}

# Whether reservation $id is still ours. A worker that does not answer may be restarting: it has 30 looks.
held() {
    local now
    if now=$(curl -sS --max-time 5 "$control/reservation"); then
        silent=0
        [[ $now == "{\"id\":\"$id\""* ]]
    else
        ((++silent < 30))
    fi
}

# The job in $job. 0: it is done or failed; 1: the reservation is gone, or this shell was told to stop.
one_job() {
    local pid code silent=0
    setsid bash -- "$current/$job" & # in a group of its own, so that all of it can be ended
    pid=$!
    echo $pid >&"${HEALTH[1]}"
    while kill -0 $pid 2>/dev/null; do
        sleep 1 &
        wait -n $pid $!
        kill -0 $pid 2>/dev/null || break
        stay_attached
        if [[ $stop ]] || ! held; then
            kill -TERM -- -$pid 2>/dev/null
            for _ in {1..50}; do kill -0 -- -$pid 2>/dev/null || break; sleep 0.1; done
            kill -KILL -- -$pid 2>/dev/null
            echo 0 >&"${HEALTH[1]}"
            mv -T -- "$current/$job" "$queue/new/$job"
            return 1
        fi
    done
    wait $pid
    code=$?
    echo 0 >&"${HEALTH[1]}"
    if ((code == 0)); then
        mv -T -- "$current/$job" "$queue/done/$job"
    else
        failed=$((failed + 1)) last=$code
        mv -T -- "$current/$job" "$queue/failed/$job"
    fi
}

# One job after another, until none has come for WAIT_SECONDS: the caller may be quicker than its queue.
drain() {
    local job runs=0 failed=0 last=0 empty=0
    attach
    while ((empty < 10 * ${WAIT_SECONDS:-5})) && [[ ! $stop ]]; do
        if take; then
            empty=0 runs=$((runs + 1))
            one_job || { [[ $stop ]] && release '{"error": "the consumer was stopped"}'; return; }
        else
            empty=$((empty + 1))
            sleep 0.1
        fi
    done
    release "{\"exit_code\": $last, \"runs\": $runs, \"failed\": $failed}"
}

until [[ $stop ]]; do
    [[ ${HEALTH_PID:-} ]] || exit 1 # the port is taken: the supervisor tries again
    reservation=$(curl -sS --max-time 10 "$control/reservation?wait=5" 2>/dev/null) || { sleep 1; continue; }
    id=$(sed -nE 's/^\{"id":"([a-z0-9]+)".*/\1/p' <<<"$reservation")
    [[ $id ]] && drain
done
exit 0
