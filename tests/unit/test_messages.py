"""The messages to the autoscaler and its signature: golden vectors, and comparison with the SDK's own code."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from nullworker.autoscaler.messages import (
    Identity,
    Load,
    delete_requests,
    failed_start,
    outcome_of,
    worker_status,
)
from nullworker.autoscaler.signature import PublicKey, signed_bytes
from nullworker.eventlog.queries import Finished
from nullworker.fsm.book import Reservation
from nullworker.fsm.events import Queued

ME = Identity(42, "secret", "https://10.0.0.1:40000", 100.0)

GOLDEN_KEY = b"""-----BEGIN PUBLIC KEY-----
MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAsVMDvKV/WgIfXn1mjeJZ
VSpDFU16vLBtrrGWPVWgwuqcyOLOV/3ExsjxZ3f7/POpl8X9fIFVNruJzyyiS+Y+
j4VOpj5leMCiJEubEvzTJyU/Z8fCmcxImj24cSH4JcuIahVb3HqD1DGmU+7YoTtp
Y8JU59lee3mSTuMC8xF1QVYLK1fxGehoAgyS/BcOJEGtFGOSOUd7MyS60GwFaKTN
Pc1nwLOXuoL19elc7Bbp/TNZ3A4Z+dH0cAyUWZ3tFlLNj7r+qKnCfGoaVRRbbluy
n/Yj6ryXqGK/t0zP82/Qy7pYs4Sd28gGmhZe+QqJ0Ie/KCvmyXtUxbRbeI9TUYs7
mQIDAQAB
-----END PUBLIC KEY-----
"""
GOLDEN_URL = "https://203.0.113.7:40123"
GOLDEN_SIGNATURE = (
    "amX9BsBMrHE9jggvEvrrR4QQT62+rvVFPBGHCDNUwuKk7bMjAkXm20PqTQdrkOoap+kJC7f28Ouutv8BZZgszn7giMXEegoYBdup"
    "9lFFeQuRsqeGTF8aNoVqRL6ePS346+Tf1Qtu3bvpWLvgBGlHl6CzbsV0WP1OHWuEc04+UdOYC9dDwLHA7ZnFzPtqUn+p56zu2qwX"
    "lb4ChrNxY+G+xky82WujuCnyWCgh+JlqnuDaKvnjV2coayVZvDnSoZQg02pEkFwcvYuDFBMPnPI6d2hjTLRP6oGtDHuryEGvmXO+"
    "gbRhlyUoyvKc/M/KXh7NzTB6Rm4govfOWCUWDrszUQ=="
)


def test_the_signed_bytes_are_the_autoscalers() -> None:
    assert signed_bytes("https://x:1") == b'{\n    "url": "https://x:1"\n}'
    assert signed_bytes("https://ü") == b'{\n    "url": "https://\\u00fc"\n}'


def test_a_golden_signature_is_good_and_any_change_to_it_is_not() -> None:
    key = PublicKey(GOLDEN_KEY)
    assert key.verify(GOLDEN_URL, GOLDEN_SIGNATURE)
    assert not key.verify(GOLDEN_URL + "/", GOLDEN_SIGNATURE)
    for _ in range(2):  # nothing of one that is bad is remembered
        assert not key.verify(GOLDEN_URL, "B" + GOLDEN_SIGNATURE[1:])
    for nonsense in ("", "?", "AAAA", GOLDEN_SIGNATURE[:-4], "ü" * 344):
        assert not key.verify(GOLDEN_URL, nonsense)
    assert key.verify(GOLDEN_URL, GOLDEN_SIGNATURE)


def test_nothing_is_good_before_something_was() -> None:
    assert not PublicKey(GOLDEN_KEY).verify("", "")


@pytest.mark.parametrize("form", [PublicFormat.SubjectPublicKeyInfo, PublicFormat.PKCS1])
def test_a_key_is_read_in_either_form_of_pem(form: PublicFormat) -> None:
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    key = PublicKey(private.public_key().public_bytes(Encoding.PEM, form))
    signature = base64.b64encode(private.sign(signed_bytes("http://a"), padding.PKCS1v15(), SHA256())).decode()
    assert key.verify("http://a", signature)


UNKNOWN_KIND = b"-----BEGIN PUBLIC KEY-----\nMBIwCwYJKwYBBAGCNxUBAwMAAQI=\n-----END PUBLIC KEY-----\n"


@pytest.mark.parametrize("pem", [b"", b"no key", GOLDEN_KEY[:200], UNKNOWN_KIND])
def test_what_is_no_key_is_refused(pem: bytes) -> None:
    with pytest.raises(ValueError, match=r"PEM|key"):
        PublicKey(pem)


def reservation(index: int | None) -> Reservation:
    return Reservation("r", Queued(kind="request", duration_cap=1.0, give_up_at=1.0, request_idx=index), 0.0)


def test_a_status_has_the_figures_of_the_reservations() -> None:
    load = Load(received=500, cancelled=200, rejected=300, served=100)
    status = worker_status(
        ME,
        load=load,
        served=100.0,
        live=[reservation(7), reservation(None)],
        requests_received=9,
        load_seconds=0.25,
        error_msg="",
        disk_gb=10.5,
        disk_added_gb=0.5,
    )
    assert status == {
        "id": 42,
        "mtoken": "secret",
        "version": "1.1.0",
        "loadtime": 0.25,
        "cur_load": 200.0,
        "rej_load": 300.0,
        "new_load": 300.0,
        "error_msg": "",
        "max_perf": 100.0,
        "cur_perf": 100.0,
        "cur_capacity": 0,
        "max_capacity": 0,
        "num_requests_working": 2,
        "num_requests_recieved": 9,
        "additional_disk_usage": 0.5,
        "disk_usage": 10.5,
        "working_request_idxs": [7],
        "url": "https://10.0.0.1:40000",
    }


def test_a_failed_start_has_no_perf_and_says_why() -> None:
    status = failed_start(ME, "port 3000 is taken")
    assert (status["max_perf"], status["loadtime"], status["error_msg"]) == (0.0, 0.0, "port 3000 is taken")


def test_figures_are_set_back_by_what_was_delivered_and_keep_what_came_in_the_meantime() -> None:
    load = Load()
    for _ in range(3):
        load.begun(100.0)
    load.ended("Success", 100.0, at_once=False)
    sent = load.copy()
    load.begun(100.0)
    load.begun(100.0)
    load.ended("Rejected", 100.0, at_once=True)
    load.ended("Rejected", 100.0, at_once=False)
    load.ended("Cancelled", 100.0, at_once=False)
    load.set_back(sent)
    assert load == Load(received=100, cancelled=100, rejected=200, served=0)


def test_new_load_is_never_negative() -> None:
    load = Load(received=0, cancelled=100)
    values: dict[str, Any] = {"requests_received": 1, "load_seconds": 0.0, "error_msg": ""}
    assert worker_status(ME, load=load, served=0.0, live=(), disk_gb=0.0, disk_added_gb=0.0, **values)["new_load"] == 0


def test_outcomes_have_the_sdks_words_and_zero_for_a_time_that_never_came() -> None:
    body = delete_requests(
        ME,
        [
            Finished(3, 1, "Success", 10.0, 11.0, 12.0, False),
            Finished(6, 2, "Cancelled", 10.0, 11.0, 12.0, False),
            Finished(8, 3, "Rejected", 10.0, None, 12.0, False),
            Finished(9, 4, "Error", 10.0, 11.0, 12.0, False),
        ],
    )
    times = ("entered_queue_at", "work_started_at", "work_completed_at")
    assert (body["worker_id"], body["mtoken"]) == (42, "secret")
    assert [(r["request_idx"], r["success"], r["status"], *(r[t] for t in times)) for r in body["requests"]] == [
        (1, True, "Success", 10.0, 11.0, 12.0),
        (2, True, "Cancelled", 10.0, 11.0, 0),
        (3, False, "Rejected", 10.0, 0, 0),
        (4, False, "Error", 10.0, 11.0, 0),
    ]


def test_the_secret_is_not_in_the_repr() -> None:
    assert "secret" not in repr(ME)


SDK = """
import dataclasses, json, sys
from vastai.serverless.server.lib.backend import VERSION
from vastai.serverless.server.lib.data_types import WorkerStatusData
print(json.dumps([VERSION, [f.name for f in dataclasses.fields(WorkerStatusData)]]))
"""


@pytest.mark.process
def test_a_status_has_the_fields_of_the_official_worker() -> None:
    ran = subprocess.run([sys.executable, "-c", SDK], capture_output=True, text=True, check=True)
    version, fields = json.loads(ran.stdout)
    status = failed_start(ME, "")
    assert version == status["version"]
    assert set(fields) == set(status)


OUTCOME = """
import asyncio, json, sys
from vastai.serverless.server.lib.metrics import Metrics
from vastai.serverless.server.lib.data_types import RequestMetrics
sent = []
class Http:
    def post(self, url, json): sent.append(json); return self
    async def __aenter__(self): return self
    async def __aexit__(self, *_): pass
    status = 200
    def raise_for_status(self): pass
async def main():
    m = Metrics(id=42, report_addr=["http://x"], url="")
    m._set_mtoken("secret")
    m._session = Http()
    for end in (m._request_success, m._request_canceled):
        r = RequestMetrics(request_idx=1, reqnum=1, workload=100, status="")
        m._request_start(r); end(r); m._request_end(r)
    r = RequestMetrics(request_idx=1, reqnum=1, workload=100, status="")
    m._request_reject(r)
    await m._Metrics__send_delete_requests_and_reset()
asyncio.run(main())
print(json.dumps(sent[0]))
"""


@pytest.mark.process
def test_outcomes_have_the_fields_and_flags_of_the_official_worker() -> None:
    ran = subprocess.run([sys.executable, "-c", OUTCOME], capture_output=True, text=True, check=True)
    theirs = json.loads(ran.stdout)
    ours = delete_requests(
        ME, [Finished(2, 1, outcome, 1.0, 1.0, 1.0, False) for outcome in ("Success", "Cancelled", "Rejected")]
    )
    assert set(theirs) == set(ours)
    for their, our in zip(theirs["requests"], ours["requests"], strict=True):
        assert set(their) == set(our)
        assert (their["status"], their["success"]) == (our["status"], our["success"])


def test_a_key_of_another_kind_is_no_key() -> None:
    pem = ec.generate_private_key(ec.SECP256R1()).public_key()
    with pytest.raises(ValueError, match="is not an RSA key"):
        PublicKey(pem.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def test_each_end_is_counted_once_and_set_back_to_nothing_by_its_report() -> None:
    load = Load()
    assert load == Load(received=0, cancelled=0, rejected=0, served=0)
    for outcome, count in (("Success", 1), ("Cancelled", 2), ("Rejected", 3)):
        for _ in range(count):
            load.begun(100.0)
            load.ended(outcome, 100.0, at_once=False)  # type: ignore[arg-type]
    assert load == Load(received=600, cancelled=200, rejected=300, served=100)
    load.set_back(load.copy())
    assert load == Load()


def test_an_outcome_is_another_for_who_was_held_than_for_who_waited() -> None:
    ended = reservation(7)
    ended.state, ended.reason = "cancelled", "draining"
    assert outcome_of(ended) == "Rejected"
    ended.held_at = 1.0
    assert outcome_of(ended) == "Cancelled"


def test_a_failed_start_has_no_figures() -> None:
    status = failed_start(ME, "port 3000 is taken")
    told = {"id", "mtoken", "version", "url", "error_msg"}
    assert {field: value for field, value in status.items() if value} == {field: status[field] for field in told}
