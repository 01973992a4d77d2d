#!/usr/bin/env bash
# Jobs are scripts in a folder, one for each reservation. The worker is spoken to with curl alone.
#
#   queue/new/NAME       waits.  Write a job elsewhere on the same disk and `mv` it in: that is one step.
#   queue/current/NAME   was begun
#   queue/done/NAME, queue/failed/NAME
#
# The `mv` to done is the acknowledgement. What a consumer that died has begun goes back to new at the next start.
set -u
curl() { command curl --noproxy '*' "$@"; } # whatever proxy the machine has: the worker is on this one
control=http://127.0.0.1:${NULL_CONTROL_PORT:-18999}
queue=${JOB_FOLDER:-queue}
current=$queue/current${CONTAINER_ID:+.$CONTAINER_ID} # a volume may be shared by instances
mkdir -p "$queue"/{new,done,failed} "$current"
find "$current" -type f -exec mv -t "$queue/new" {} +

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

# The next job, moved to current. It is waited for 5 s: the caller may be quicker than its queue.
take() {
    local path
    for _ in {1..50}; do
        for path in "$queue"/new/*; do
            mv "$path" "$current" 2>/dev/null && echo "${path##*/}" && return
        done
        sleep 0.1
    done
    return 1
}

# By its id: should the reservation be over by now, this ends no other one.
release() {
    curl -sS --retry 5 --retry-connrefused "$control/release" -d "{\"reservation_id\": \"$id\", \"result\": $1}"
    echo
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

one_job() {
    local job pid code silent=0
    if ! job=$(take); then
        release '{"job": null}'
        return
    fi
    setsid bash "$current/$job" & # in a group of its own, so that all of it can be ended
    pid=$!
    echo $pid >&"${HEALTH[1]}"
    while kill -0 $pid 2>/dev/null; do
        sleep 1 &
        wait -n $pid $!
        kill -0 $pid 2>/dev/null || break
        if [[ $stop ]] || ! held; then
            kill -TERM -- -$pid 2>/dev/null
            for _ in {1..50}; do kill -0 -- -$pid 2>/dev/null || break; sleep 0.1; done
            kill -KILL -- -$pid 2>/dev/null
            echo 0 >&"${HEALTH[1]}"
            mv "$current/$job" "$queue/new/$job"
            [[ $stop ]] && release '{"error": "the consumer was stopped"}'
            return
        fi
    done
    wait $pid
    code=$?
    echo 0 >&"${HEALTH[1]}"
    if ((code == 0)); then mv "$current/$job" "$queue/done/$job"; else mv "$current/$job" "$queue/failed/$job"; fi
    release "{\"job\": \"$job\", \"exit_code\": $code}"
}

until [[ $stop ]]; do
    [[ ${HEALTH_PID:-} ]] || exit 1 # the port is taken: the supervisor tries again
    reservation=$(curl -sS --max-time 10 "$control/reservation?wait=5" 2>/dev/null) || { sleep 1; continue; }
    id=$(sed -nE 's/^\{"id":"([a-z0-9]+)".*/\1/p' <<<"$reservation")
    [[ $id ]] && one_job
done
exit 0
