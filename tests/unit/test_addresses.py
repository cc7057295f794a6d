from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra._redis import address as _address
from orchestra._redis.address import Address, default_address, parse_address
from orchestra.errors import ConfigurationError


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://localhost", {"hosts": (("localhost", 6379),), "db": 0}),
        ("redis://h:6380/3", {"hosts": (("h", 6380),), "db": 3}),
        ("REDIS://h/", {"scheme": "redis", "hosts": (("h", 6379),)}),
        ("redis://[::1]:6380/1", {"hosts": (("::1", 6380),), "db": 1}),
        ("redis://:secret@h", {"username": None, "password": "secret"}),
        ("redis://us%40er:p%2Fw%3A%23@h", {"username": "us@er", "password": "p/w:#"}),
        ("redis://user@h", {"username": "user", "password": None}),
        ("redis://user:@h", {"username": "user", "password": ""}),
        ("rediss://h?ssl_ca_certs=/etc/ca.pem&ssl_check_hostname=no", {"scheme": "rediss"}),
        ("unix:///run/my%20redis.sock?db=2", {"path": "/run/my redis.sock", "db": 2}),
        ("unix://u:p@/run/r.sock", {"path": "/run/r.sock", "username": "u", "password": "p"}),
        ("unix:///r.sock?username=u&password=p", {"path": "/r.sock", "username": "u", "password": "p"}),
        (
            "redis+sentinel://a,b:26380/mymaster/4",
            {"hosts": (("a", 26379), ("b", 26380)), "service": "mymaster", "db": 4},
        ),
        ("redis+cluster://a,b:7000", {"hosts": (("a", 6379), ("b", 7000))}),
        ("embedded:", {"path": ""}),
        ("embedded:/var/lib/q", {"path": "/var/lib/q"}),
        ("embedded:///var/lib/q", {"path": "/var/lib/q"}),
        ("embedded:some%3Fdir", {"path": "some?dir"}),
        ("memory:", {"scheme": "memory"}),
    ],
)
def test_accepted_addresses(url, expected):
    address = parse_address(url)
    assert {name: getattr(address, name) for name in expected} == expected


def test_options_are_converted():
    options = parse_address(
        "rediss://h?socket_timeout=2.5&max_connections=8&client_name=me&ssl_check_hostname=no&ssl_cert_reqs=none"
    ).options
    assert options == {
        "socket_timeout": 2.5,
        "max_connections": 8,
        "client_name": "me",
        "ssl_check_hostname": False,
        "ssl_cert_reqs": "none",
    }


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "redis://"),
        ("localhost:6379", "must be one of"),
        ("http://h", "must be one of"),
        ("file:///etc/passwd", "must be one of"),
        ("redis://", "host and a port"),
        ("redis://h:0", "1 to 65535"),
        ("redis://h:70000", "1 to 65535"),
        ("redis://h:port", "host number 1"),
        ("redis://h/x", "database number"),
        ("redis://h/-1", "database number"),
        ("redis://h/1/2", "does not belong"),
        ("redis://a,b", "several hosts"),
        ("redis://h?socket_timout=3", "'socket_timout'"),
        ("redis://h?socket_timeout=0", "above 0"),
        ("redis://h?socket_timeout=nan", "above 0"),
        ("redis://h?max_connections=0", "from 1"),
        ("redis://h?client_name=a%20b", "without spaces"),
        ("redis://h?client_name=a&client_name=b", "twice"),
        ("redis://h?ssl_ca_certs=x", "'ssl_ca_certs'"),
        ("redis://h?protocol=3", "'protocol'"),
        ("rediss://h?ssl_cert_reqs=maybe", "required, optional or none"),
        ("rediss://h?ssl_check_hostname=maybe", "true or false"),
        ("unix://run/r.sock", "three slashes"),
        ("unix://", "three slashes"),
        ("redis:h", "//"),
        ("redis://[::1", "host number 1"),
        ("redis+sentinel://h", "service"),
        ("redis+cluster://h/1", "does not belong"),
        ("memory:x", "just memory:"),
        ("redis://:pa#ss@h", "%23"),
    ],
)
def test_refused_addresses_say_what_is_wrong(url, says):
    with pytest.raises(ConfigurationError) as caught:
        parse_address(url)
    assert says in str(caught.value)
    assert caught.value.field


def test_an_address_must_be_text():
    with pytest.raises(ConfigurationError):
        parse_address(None)


SECRET = "s3cr3t-w0rd"


@pytest.mark.parametrize(
    "url",
    [
        f"redis://user:{SECRET}@h:1/2",
        f"unix:///r.sock?password={SECRET}",
        f"unix://u:{SECRET}@/r.sock",
        f"redis+sentinel://:{SECRET}@h/m?sentinel_password={SECRET}",
    ],
)
def test_no_password_is_shown(url):
    address = parse_address(url)
    for text in (repr(address), str(address), address.safe, f"{address}"):
        assert SECRET not in text
        assert "***" in text or url.startswith("unix:///")


@pytest.mark.parametrize(
    "url",
    [
        f"redis://user:{SECRET}@h:badport",
        f"redis://user:{SECRET}/x@h:1",
        f"redis://user:{SECRET}#x@h",
        f"redis://user:{SECRET}?x@h",
        f"redis://user:x?{SECRET}@h",
        f"redis://user:x/{SECRET}@h",
        f"redis://user:{SECRET}@h?nope=1",
        f"unix:///r.sock?password={SECRET}&nope=1",
        f"mysql://user:{SECRET}@h",
        f"user:{SECRET}@h",
        f"redis+sentinel://h/m?sentinel_password={SECRET}&nope=1",
    ],
)
def test_errors_show_no_password_either(url):
    with pytest.raises(ConfigurationError) as caught:
        parse_address(url)
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value.value)


@given(user=st.text(min_size=1), password=st.text())
def test_any_user_and_password_survive_percent_encoding(user, password):
    from urllib.parse import quote

    try:
        url = f"redis://{quote(user, safe='')}:{quote(password, safe='')}@h"
    except UnicodeEncodeError:  # a lone surrogate has no percent-encoding
        return
    address = parse_address(url)
    assert (address.username, address.password) == (user, password)


@given(st.text(max_size=60))
def test_any_text_parses_or_is_refused_in_our_words(text):
    for url in (text, f"redis://{text}", f"redis+sentinel://{text}", f"unix://{text}", f"embedded:{text}"):
        try:
            assert isinstance(parse_address(url), Address)
        except ConfigurationError:
            pass


@pytest.mark.parametrize(
    "url",
    [
        "redis://h:6379/3",
        "redis+sentinel://a:1,b:2/m/1",
        "unix:///a%20b.sock",
        "embedded:/x",
        "memory:",
        "rediss://[::1]:1",
    ],
)
def test_safe_is_an_address_again_where_there_is_no_secret(url):
    address = parse_address(url)
    again = parse_address(address.safe)
    assert again == address


def test_default_address_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("ORCHESTRA_REDIS_URL", "redis://h:1")
    assert default_address().hosts == (("h", 1),)


def test_default_address_is_the_embedded_server_said_once(monkeypatch, caplog):
    monkeypatch.delenv("ORCHESTRA_REDIS_URL", raising=False)
    monkeypatch.setattr(_address, "_said_default", [])
    with caplog.at_level(logging.INFO, logger="orchestra"):
        assert default_address().scheme == "embedded"
        assert default_address().scheme == "embedded"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert str(_address.default_directory()) in said[0]
