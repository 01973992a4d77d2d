#!/bin/bash
# As Vast's own programs do: not before the instance is provisioned. exec, so that the supervisor's SIGTERM arrives.
while [ -f /.provisioning ]; do sleep 5; done
exec "${CONSUMER_VENV:-/opt/consumer/venv}/bin/nullworker" work --health-port "${HEALTH_PORT:-18998}" -- \
    "${CONSUMER_VENV:-/opt/consumer/venv}/bin/python" "${CONSUMER:-/opt/consumer/consumer.py}"
